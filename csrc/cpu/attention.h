// Softmax attention of one head in one window.
//
// Lanes run over queries: scores are transposed, S^T[key][query]. Maximum, exponential and sum are vertical vector
// arithmetic, keys need no mask, and P^T already is the unit-stride left operand of P V. A long window is cut into
// blocks of keys with a running maximum, so memory does not grow with the window. A block of keys serves several
// blocks of queries before the next is read.
#pragma once

#include "gemm.h"

CAST_ISA_BEGIN

constexpr i64 kKeyBlock = 128;  // P^T of a query block and a panel of values stay in a 32 KiB L1
constexpr i64 kSumChain = 16;   // terms added before a sum moves up a level: keeps rounding error small
constexpr int kMaxQueries = kScoreVecs * kLanes;
// Queries that share a block of keys. With 96 instead of 192, attention over 1568 keys took 3 to 5 % longer.
constexpr i64 kQueryGroup = (192 + kMaxQueries - 1) / kMaxQueries * kMaxQueries;

struct AttentionScratch {
  float* queries;   // [query block][head_dim][kMaxQueries], scaled
  float* scores;    // [kKeyBlock + slack][kMaxQueries]
  float* values;    // [head_dim / kTileColumns][kKeyBlock][kTileColumns]
  float* sums;      // [kQueryGroup][round_up(head_dim, kTileColumns)]
  float *maximum, *total;  // [kQueryGroup]
};

CAST_INLINE i64 attention_scratch_size(i64 head_dim) {
  return align16(head_dim * kQueryGroup) + align16((kKeyBlock + 16) * kMaxQueries) +
         (kKeyBlock + kQueryGroup) * round_up(head_dim, kTileColumns) + 2 * kQueryGroup + 64;
}

CAST_INLINE AttentionScratch attention_scratch(float* at, i64 head_dim) {
  AttentionScratch s;
  s.queries = at;
  s.scores = s.queries + align16(head_dim * kQueryGroup);
  s.values = s.scores + align16((kKeyBlock + 16) * kMaxQueries);
  s.sums = s.values + kKeyBlock * round_up(head_dim, kTileColumns);
  s.maximum = s.sums + kQueryGroup * round_up(head_dim, kTileColumns);
  s.total = s.maximum + kQueryGroup;
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

// Keys of a score tile.
constexpr int score_rows(int vecs) { return vecs == 1 ? 8 : (vecs == 2 && kLanes == 8 ? 6 : kScoreRows); }

// scores[key][lane] = keys . transposed queries, for whole tiles of keys (the last may run past `count`). The vectors
// of `peak` are raised to the largest score while the scores are in registers: no extra pass over memory. Out of
// line, like weigh_values: inlined together their tiles lose registers (2 ms of a 95 ms forward, measured).
template <int Vecs>
__attribute__((noinline)) void score_keys(const float* keys, i64 count, i64 head_dim, const float* queries,
                                          float* scores, float* peak) {
  constexpr int rows = score_rows(Vecs);
  constexpr i64 width = Vecs * kLanes;
  for (i64 j = 0; j < count; j += rows) {
    vec acc[rows][Vecs];
    announce_reads(keys + j * head_dim, min_of(rows, count - j), head_dim, head_dim);
    multiply(acc, keys + j * head_dim, head_dim, 1, queries, width, head_dim);
    const i64 valid = count - j;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < Vecs; ++c) store(scores + (j + r) * width + c * kLanes, acc[r][c]);
#pragma GCC unroll 4
    for (int c = 0; c < Vecs; ++c) {
      vec highest = load(peak + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
        if (r < valid) highest = max_of(acc[r][c], highest);
      store(peak + c * kLanes, highest);
    }
  }
}

// scores = 2^(scores - maximum) in place; their sums over the keys are added to `total` in short chains. One chain over
// all keys doubles the error of gradients that sum over the rows of a window.
template <int Vecs>
__attribute__((noinline)) void weigh_scores(float* scores, i64 keys, const float* maximum, float* total) {
  constexpr i64 width = Vecs * kLanes;
  vec top[Vecs], all[Vecs];
  for (int c = 0; c < Vecs; ++c) top[c] = load(maximum + c * kLanes), all[c] = load(total + c * kLanes);
  for (i64 chain = 0; chain < keys; chain += kSumChain) {
    vec part[Vecs] = {};
    for (i64 j = chain; j < min_of(chain + kSumChain, keys); ++j)
#pragma GCC unroll 4
      for (int c = 0; c < Vecs; ++c) {
        const vec weight = exp2(load(scores + j * width + c * kLanes) - top[c]);
        store(scores + j * width + c * kLanes, weight);
        part[c] += weight;
      }
    for (int c = 0; c < Vecs; ++c) all[c] += part[c];
  }
  for (int c = 0; c < Vecs; ++c) store(total + c * kLanes, all[c]);
}

// Rows as the right operand of a product: columns [k * kTileColumns, ...) of row j at data + k * panel + j * stride.
struct RightRows {
  const float* data;
  i64 panel, stride;
};

// Rows of wide heads are copied to panels. In place these rows are a power of two apart and share few sets of L1: P V
// alone took 48 % of the time of attention with 64 channels, against 40 % in panels.
CAST_INLINE bool in_panels(i64 head_dim) { return head_dim > 2 * kTileColumns; }
inline RightRows pack_rows(const float* rows, i64 count, i64 head_dim, float* to) {
  const RightRows packed{to, count * kTileColumns, kTileColumns};
  for (i64 column = 0; column < head_dim; column += kTileColumns)
    for (i64 j = 0; j < count; ++j, to += kTileColumns)
      for (int c = 0; c < kTileVecs; ++c) {
        const i64 at = column + c * kLanes;
        store(to + c * kLanes, at < head_dim ? load_first(rows + j * head_dim + at, head_dim - at) : vec{});
      }
  return packed;
}

// Calls out(query, column, vectors, lanes) with P V over one block of keys, from P^T.
template <int Vecs, class Out>
__attribute__((noinline)) void weigh_values(const float* weights, i64 queries, const RightRows& values, i64 keys,
                                            i64 head_dim, const Out& out_at_caller) {
  constexpr i64 width = Vecs * kLanes;
  constexpr int rows = kLanes == 16 ? 8 : (Vecs == 3 && kLanes == 8 ? 6 : 4);
  static_assert(width % rows == 0, "row tiles stay inside the query block");
  const Out out = out_at_caller;
  const RightRows right = values;
  for (i64 column = 0; column < head_dim; column += kTileColumns) {
    const float* panel = right.data + column / kTileColumns * right.panel;
    for (i64 i = 0; i < queries; i += rows) {
      vec acc[rows][kTileVecs];
      announce_reads(panel, keys, right.stride, min_of(kTileColumns, head_dim - column));
      multiply(acc, weights + i, 1, width, panel, right.stride, keys);
      emit(acc, i, queries, column, head_dim, out);
    }
  }
}

struct HeadRows {
  const float *query, *key, *value;  // [.][head_dim], contiguous; query points at the first of `queries` rows
  i64 queries, keys, head_dim;
};

// A head's results for its queries: out [queries][stride]; row_max and inverse_sum may be null.
struct HeadResult {
  float* out;
  i64 stride;
  float *row_max, *inverse_sum;
};

// One block of at most Vecs * kLanes queries, from query `at` of the group, against keys first .. first + keys - 1.
template <int Vecs>
inline void attend_block(const HeadRows& h, i64 at, i64 queries, i64 first, i64 keys, const RightRows& values,
                         const AttentionScratch& s, const HeadResult& result) {
  constexpr i64 width = Vecs * kLanes;
  const i64 hd = h.head_dim, sums_stride = round_up(hd, kTileColumns);
  const bool last = first + keys == h.keys;
  float *maximum = s.maximum + at, *total = s.total + at;
  float before[width], factor[width];
  for (int c = 0; c < Vecs; ++c) {
    store(before + c * kLanes, load(maximum + c * kLanes));
    // -inf, not a finite number: a lower score could not replace a finite one.
    if (!first) store(maximum + c * kLanes, broadcast(-__builtin_inff()));
  }
  score_keys<Vecs>(h.key + first * hd, keys, hd, s.queries + at * hd, s.scores, maximum);
  for (int c = 0; c < Vecs; ++c) {
    const vec rescale = first ? exp2(load(before + c * kLanes) - load(maximum + c * kLanes)) : vec{};
    store(factor + c * kLanes, rescale);
    store(total + c * kLanes, first ? load(total + c * kLanes) * rescale : vec{});
  }
  weigh_scores<Vecs>(s.scores, keys, maximum, total);
  float inverse[width];
  for (int c = 0; c < Vecs; ++c) store(inverse + c * kLanes, 1.0f / load(total + c * kLanes));
  float* const sums = s.sums + at * sums_stride;
  float* const out = result.out + at * result.stride;
  const float *factors = factor, *inverses = inverse;
  weigh_values<Vecs>(s.scores, queries, values, keys, hd,
                     [=, stride = result.stride](i64 i, i64 column, auto& row, i64 lanes) {
                       float* sum = sums + i * sums_stride + column;
                       float* to = out + i * stride + column;
                       each(row, lanes, [=](i64 c, vec v, i64 n) {
                         if (first) v += load(sum + c) * factors[i];
                         if (last)
                           store_first(to + c, v * inverses[i], n);
                         else
                           store(sum + c, v);
                       });
                     });
  if (last && result.row_max)
    for (int c = 0; c < Vecs; ++c) {
      store_first(result.row_max + at + c * kLanes, load(maximum + c * kLanes), max_of(queries - c * kLanes, i64(0)));
      store_first(result.inverse_sum + at + c * kLanes, load(inverse + c * kLanes),
                  max_of(queries - c * kLanes, i64(0)));
    }
}

template <int Count>
struct Vectors {
  static constexpr int count = Count;
};

// Calls f(number of vectors, first query, queries) for blocks of the queries. The last block takes the narrowest width
// that holds it.
template <class F>
CAST_INLINE void query_blocks(i64 queries, const F& f) {
  for (i64 at = 0; at < queries; at += kMaxQueries) {
    const i64 left = min_of(queries - at, kMaxQueries);
    if (left > 2 * kLanes)
      f(Vectors<kScoreVecs>{}, at, left);
    else if (left > kLanes)
      f(Vectors<2>{}, at, left);
    else
      f(Vectors<1>{}, at, left);
  }
}

// Attention of all queries of `h`; scale_log2 multiplies the scores.
inline void attend(HeadRows h, float scale_log2, const AttentionScratch& s, HeadResult result) {
  const i64 all = h.queries, hd = h.head_dim;
  for (i64 done = 0; done < all; done += kQueryGroup) {
    h.queries = min_of(all - done, kQueryGroup);
    query_blocks(h.queries, [&](auto vecs, i64 at, i64 queries) {
      transpose_rows<decltype(vecs)::count>(h.query + at * hd, hd, queries, hd, scale_log2, s.queries + at * hd);
    });
    for (i64 first = 0; first < h.keys; first += kKeyBlock) {
      const i64 keys = min_of(kKeyBlock, h.keys - first);
      const float* rows = h.value + first * hd;
      const bool pack = in_panels(hd) && h.queries > kMaxQueries;
      const RightRows values = pack ? pack_rows(rows, keys, hd, s.values) : RightRows{rows, kTileColumns, hd};
      query_blocks(h.queries, [&](auto vecs, i64 at, i64 queries) {
        attend_block<decltype(vecs)::count>(h, at, queries, first, keys, values, s, result);
      });
    }
    h.query += h.queries * hd;
    result.out += h.queries * result.stride;
    if (result.row_max) result.row_max += h.queries, result.inverse_sum += h.queries;
  }
}

CAST_ISA_END
