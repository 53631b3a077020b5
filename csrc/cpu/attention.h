// Softmax attention of one head in one window.
//
// Lanes run over queries: scores are computed transposed, S^T[key][query], so maximum, exponential and sum are plain
// vertical vector arithmetic, keys need no mask, and P^T is at once the unit-stride left operand of P V. Long windows
// go by blocks of keys with a running maximum, so memory never grows with the window.
#pragma once

#include "gemm.h"

CAST_ISA_BEGIN

constexpr i64 kKeyBlock = 256;
constexpr i64 kSumChain = 16;  // terms added before a sum moves up a level: keeps rounding error small
constexpr int kMaxQueries = kScoreVecs * kLanes;

struct AttentionScratch {
  float* queries;  // [head_dim][kMaxQueries], scaled
  float* scores;   // [kKeyBlock + slack][kMaxQueries]
  float* sums;     // [kMaxQueries][round_up(head_dim, kTileColumns)]
};

CAST_INLINE i64 attention_scratch_size(i64 head_dim) {
  return align16(head_dim * kMaxQueries) + align16((kKeyBlock + 16) * kMaxQueries) +
         align16(kMaxQueries * round_up(head_dim, kTileColumns));
}

CAST_INLINE AttentionScratch attention_scratch(float* at, i64 head_dim) {
  AttentionScratch s;
  s.queries = at;
  s.scores = s.queries + align16(head_dim * kMaxQueries);
  s.sums = s.scores + align16((kKeyBlock + 16) * kMaxQueries);
  return s;
}

// to[c][lane] = factor * rows[lane][c] for `count` rows of width `width`; lanes past `count` are zero.
template <int Vecs>
inline void transpose_rows(const float* rows, i64 stride, i64 count, i64 width, float factor, float* to) {
  for (int v = 0; v < Vecs; ++v) {
    const i64 first = v * kLanes;
    for (i64 c = 0; c < width; c += kLanes) {
      vec block[kLanes];
      for (int r = 0; r < kLanes; ++r)
        block[r] = first + r < count ? load_first(rows + (first + r) * stride + c, width - c) * factor : vec{};
      transpose(block);
      for (i64 r = 0; r < min_of(kLanes, width - c); ++r) store(to + (c + r) * Vecs * kLanes + first, block[r]);
    }
  }
}

// Out of line, like weigh_values: inlined together their tiles lose registers (2 ms of a 95 ms forward, measured).
// scores[key][lane] = keys . transposed queries, for whole tiles of keys (the last may run past `count`).
template <int Vecs>
__attribute__((noinline)) void score_keys(const float* keys, i64 count, i64 head_dim, const float* queries, float* scores) {
  constexpr int rows = Vecs == 1 ? 8 : kScoreRows;
  constexpr i64 width = Vecs * kLanes;
  for (i64 j = 0; j < count; j += rows) {
    vec acc[rows][Vecs];
    announce_reads(keys + j * head_dim, min_of(rows, count - j), head_dim, head_dim);
    multiply(acc, keys + j * head_dim, head_dim, 1, queries, width, head_dim);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < Vecs; ++c) store(scores + (j + r) * width + c * kLanes, acc[r][c]);
  }
}

// out(query, column, vectors, lanes) of P V over one block of keys, from P^T.
template <int Vecs, class Out>
__attribute__((noinline)) void weigh_values(const float* weights, i64 queries, const float* values, i64 keys, i64 head_dim,
                         const Out& out) {
  constexpr i64 width = Vecs * kLanes;
  constexpr int rows = kLanes == 16 ? 8 : (Vecs == 3 && kLanes == 8 ? 6 : 4);
  static_assert(width % rows == 0, "row tiles stay inside the query block");
  for (i64 column = 0; column < head_dim; column += kTileColumns)
    for (i64 i = 0; i < queries; i += rows) {
      vec acc[rows][kTileVecs];
      announce_reads(values + column, keys, head_dim, min_of(kTileColumns, head_dim - column));
      multiply(acc, weights + i, 1, width, values + column, head_dim, keys);
      emit(acc, i, queries, column, head_dim, out);
    }
}

struct HeadRows {
  const float *query, *key, *value;  // [.][head_dim], contiguous; query points at the first of `queries` rows
  i64 queries, keys, head_dim;
};

// One block of at most Vecs * kLanes queries. out [queries][out_stride]; row_max and inverse_sum may be null.
template <int Vecs>
inline void attend_block(const HeadRows& h, float scale_log2, const AttentionScratch& s, float* out, i64 out_stride,
                         float* row_max, float* inverse_sum) {
  constexpr i64 width = Vecs * kLanes;
  const i64 sums_stride = round_up(h.head_dim, kTileColumns);
  transpose_rows<Vecs>(h.query, h.head_dim, h.queries, h.head_dim, scale_log2, s.queries);
  vec maximum[Vecs] = {}, total[Vecs] = {};
  for (i64 first = 0; first < h.keys; first += kKeyBlock) {
    const i64 keys = min_of(kKeyBlock, h.keys - first);
    score_keys<Vecs>(h.key + first * h.head_dim, keys, h.head_dim, s.queries, s.scores);
    vec peak[Vecs];
    for (int c = 0; c < Vecs; ++c) peak[c] = first ? maximum[c] : load(s.scores + c * kLanes);
    for (i64 j = 0; j < keys; ++j)
      for (int c = 0; c < Vecs; ++c) peak[c] = max_of(load(s.scores + j * width + c * kLanes), peak[c]);
    float rescale[width];
    for (int c = 0; c < Vecs; ++c) {
      const vec factor = first ? exp2(maximum[c] - peak[c]) : vec{};
      store(rescale + c * kLanes, factor);
      total[c] = first ? total[c] * factor : vec{};
      maximum[c] = peak[c];
    }
    // Short chains: one chain over all keys doubles the error of gradients that sum over the rows of a window.
    for (i64 chain = 0; chain < keys; chain += kSumChain) {
      vec part[Vecs] = {};
      for (i64 j = chain; j < min_of(chain + kSumChain, keys); ++j)
        for (int c = 0; c < Vecs; ++c) {
          const vec weight = exp2(load(s.scores + j * width + c * kLanes) - maximum[c]);
          store(s.scores + j * width + c * kLanes, weight);
          part[c] += weight;
        }
      for (int c = 0; c < Vecs; ++c) total[c] += part[c];
    }
    const float* values = h.value + first * h.head_dim;
    if (first + kKeyBlock < h.keys || first)
      weigh_values<Vecs>(s.scores, h.queries, values, keys, h.head_dim, [&](i64 i, i64 column, auto& row, i64) {
        float* sum = s.sums + i * sums_stride + column;
        each(row, kTileColumns, [&](i64 c, vec v, i64) {
          store(sum + c, first ? load(sum + c) * rescale[i] + v : v);
        });
      });
  }
  float inverse[width];
  for (int c = 0; c < Vecs; ++c) store(inverse + c * kLanes, 1.0f / total[c]);
  const auto finish = [&](i64 i, i64 c, vec v, i64 lanes) {
    store_first(out + i * out_stride + c, v * inverse[i], lanes);
  };
  if (h.keys <= kKeyBlock)
    weigh_values<Vecs>(s.scores, h.queries, h.value, h.keys, h.head_dim, [&](i64 i, i64 column, auto& row, i64 lanes) {
      each(row, lanes, [&](i64 c, vec v, i64 n) { finish(i, column + c, v, n); });
    });
  else
    for (i64 i = 0; i < h.queries; ++i)
      for (i64 c = 0; c < h.head_dim; c += kLanes)
        finish(i, c, load(s.sums + i * sums_stride + c), h.head_dim - c);
  if (row_max)
    for (int c = 0; c < Vecs; ++c) {
      store_first(row_max + c * kLanes, maximum[c], h.queries - c * kLanes);
      store_first(inverse_sum + c * kLanes, load(inverse + c * kLanes), h.queries - c * kLanes);
    }
}

// All queries of `h`: wide blocks while they pay, then blocks of one vector.
inline void attend(HeadRows h, float scale_log2, const AttentionScratch& s, float* out, i64 out_stride, float* row_max,
                   float* inverse_sum) {
  const i64 all = h.queries;
  for (i64 i = 0; i < all;) {
    const i64 left = all - i;
    h.queries = min_of(left, left > kLanes ? kMaxQueries : kLanes);
    if (left > kLanes)
      attend_block<kScoreVecs>(h, scale_log2, s, out, out_stride, row_max, inverse_sum);
    else
      attend_block<1>(h, scale_log2, s, out, out_stride, row_max, inverse_sum);
    i += h.queries;
    h.query += h.queries * h.head_dim;
    out += h.queries * out_stride;
    if (row_max) row_max += h.queries, inverse_sum += h.queries;
  }
}

CAST_ISA_END
