// Gradients of softmax attention of one head in one window.
//
// As in attention.h lanes run over queries: P^T and dS^T are [key][query]. They are kept for kSuperBlock queries and
// kKeyBlock keys at a time, so that all five products run at tile speed and memory does not grow with the window. Some
// arrays of a super-block of queries are needed in another order; they are copied once, before the loop over all keys.
#pragma once

#include "attention.h"

CAST_ISA_BEGIN

constexpr i64 kSuperBlock = (112 + kMaxQueries - 1) / kMaxQueries * kMaxQueries;
constexpr i64 kScoreStride = kSuperBlock + 16;  // row tiles read past the last query

struct AttentionBackwardScratch {
  float *queries, *grads;    // [query block][head_dim][its width], queries scaled
  float *weights, *slopes;   // [kKeyBlock + 16][kScoreStride]: P^T, dS^T
  float *query_panels, *grad_panels, *key_panels;  // of wide heads
  float* dquery;             // [kSuperBlock][round_up(head_dim, kTileColumns)]: sums over blocks of keys
};

CAST_INLINE i64 attention_backward_scratch_size(i64 head_dim) {
  return 2 * align16(head_dim * kSuperBlock) + 2 * align16((kKeyBlock + 16) * kScoreStride) +
         (3 * kSuperBlock + kKeyBlock) * round_up(head_dim, kTileColumns) + 64;
}

CAST_INLINE AttentionBackwardScratch attention_backward_scratch(float* at, i64 head_dim) {
  const i64 width = round_up(head_dim, kTileColumns);
  AttentionBackwardScratch s;
  s.queries = at;
  s.grads = s.queries + align16(head_dim * kSuperBlock);
  s.weights = s.grads + align16(head_dim * kSuperBlock);
  s.slopes = s.weights + align16((kKeyBlock + 16) * kScoreStride);
  s.query_panels = s.slopes + align16((kKeyBlock + 16) * kScoreStride);
  s.grad_panels = s.query_panels + kSuperBlock * width;
  s.dquery = s.grad_panels + kSuperBlock * width;
  s.key_panels = s.dquery + kSuperBlock * width;
  return s;
}

struct HeadGradient {
  const float *query, *key, *value, *grad;  // [window][head_dim], contiguous
  const float *row_max, *inverse_sum;       // [window], base 2
  const float* delta;                       // [window], rows of grad . attended
  i64 window, head_dim;
  float *dquery, *dkey, *dvalue;            // head's first column of row 0 of the two streams' matrices
  const i64 *asking, *answering;            // [window], offset of each row
};

// P^T and dS^T of one block of queries against one block of keys; `at` is the block's first query in the super-block.
template <int Vecs>
__attribute__((noinline)) void score_gradients(const HeadGradient& h, i64 first_query, i64 at, i64 queries,
                                               i64 first_key, i64 keys, const AttentionBackwardScratch& s) {
  constexpr int rows = score_rows(Vecs);
  constexpr i64 width = Vecs * kLanes;
  const i64 hd = h.head_dim;
  // The softmax of a single score is constant, so its slope is exactly 0. The difference below would leave a rounding
  // error.
  const float slope = h.window == 1 ? 0.0f : 1.0f;
  vec maximum[Vecs], inverse[Vecs], delta[Vecs];
  for (int c = 0; c < Vecs; ++c) {
    const i64 row = first_query + at + c * kLanes, lanes = max_of(queries - c * kLanes, i64(0));
    maximum[c] = load_first(h.row_max + row, lanes);
    inverse[c] = load_first(h.inverse_sum + row, lanes);
    delta[c] = load_first(h.delta + row, lanes);
  }
  for (i64 j = 0; j < keys; j += rows) {
    vec acc[rows][Vecs];
    float* weights = s.weights + j * kScoreStride + at;
    announce_reads(h.key + (first_key + j) * hd, min_of(rows, keys - j), hd, hd);
    multiply(acc, h.key + (first_key + j) * hd, hd, 1, s.queries + at * hd, width, hd);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < Vecs; ++c) store(weights + r * kScoreStride + c * kLanes, acc[r][c]);
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < Vecs; ++c) {
        float* to = weights + r * kScoreStride + c * kLanes;
        store(to, exp2(load(to) - maximum[c]) * inverse[c]);
      }
    announce_reads(h.value + (first_key + j) * hd, min_of(rows, keys - j), hd, hd);
    multiply(acc, h.value + (first_key + j) * hd, hd, 1, s.grads + at * hd, width, hd);
    float* slopes = s.slopes + j * kScoreStride + at;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < Vecs; ++c)
        store(slopes + r * kScoreStride + c * kLanes,
              load(weights + r * kScoreStride + c * kLanes) * (acc[r][c] - delta[c]) * slope);
  }
}

// delta[i] = grad_i . attended_i
inline void row_products(const float* attended, i64 attended_stride, const float* grad, i64 window, i64 head_dim,
                         float* delta) {
  for (i64 i = 0; i < window; ++i) {
    const float *x = attended + i * attended_stride, *y = grad + i * head_dim;
    vec sum = vec{};
    for (i64 c = 0; c < head_dim; c += kLanes) sum += load_first(x + c, head_dim - c) * load_first(y + c, head_dim - c);
    delta[i] = sum_of(sum);
  }
}

// Calls out(row, column, vectors, lanes) with left^T @ right or left @ right, in row tiles of attention's small
// matrices.
template <class Out>
__attribute__((noinline)) void small_gemm(const float* left, i64 row_stride, i64 depth_stride, i64 rows,
                                          const RightRows& right_at_caller, i64 columns, i64 depth,
                                          const Out& out_at_caller) {
  const Out out = out_at_caller;
  const RightRows right = right_at_caller;
  for (i64 column = 0; column < columns; column += kTileColumns) {
    const float* panel = right.data + column / kTileColumns * right.panel;
    for (i64 row = 0; row < rows; row += kTileRows) {
      vec acc[kTileRows][kTileVecs];
      announce_reads(panel, depth, right.stride, min_of(kTileColumns, columns - column));
      multiply(acc, left + row * row_stride, row_stride, depth_stride, panel, right.stride, depth);
      emit(acc, row, rows, column, columns, out);
    }
  }
}

// result[row] (+)= v; with `last` the whole sum is multiplied by `factor`.
struct RowSum {
  float* result;
  const i64* offsets;
  float factor;
  bool first, last;
  template <int C>
  CAST_INLINE void operator()(i64 row, i64 column, const vec (&values)[C], i64 lanes) const {
    float* to = result + offsets[row] + column;
    each(values, lanes, [this, to](i64 c, vec v, i64 n) {
      if (!first) v += load_first(to + c, n);
      store_first(to + c, last ? v * factor : v, n);
    });
  }
};

// Adds a super-block's share to the gradients of a block of keys and values.
inline void key_gradients(const HeadGradient& h, const AttentionBackwardScratch& s, const RightRows& query,
                          const RightRows& grad, i64 queries, i64 first_key, i64 keys, float scale, bool first,
                          bool last) {
  const i64* offsets = h.answering + first_key;
  small_gemm(s.weights, kScoreStride, 1, keys, grad, h.head_dim, queries, RowSum{h.dvalue, offsets, 1.0f, first, last});
  small_gemm(s.slopes, kScoreStride, 1, keys, query, h.head_dim, queries, RowSum{h.dkey, offsets, scale, first, last});
}

// Adds a block of keys' share to the gradients of a super-block of queries. The last share writes the result.
inline void query_gradients(const HeadGradient& h, const AttentionBackwardScratch& s, const RightRows& key,
                            i64 first_query, i64 queries, i64 keys, float scale, bool first, bool last) {
  const i64 stride = round_up(h.head_dim, kTileColumns);
  small_gemm(s.slopes, 1, kScoreStride, queries, key, h.head_dim, keys,
             [=, sums = s.dquery, result = h.dquery, offsets = h.asking + first_query](i64 row, i64 column,
                                                                                       auto& values, i64 lanes) {
               float *sum = sums + row * stride + column, *to = result + offsets[row] + column;
               each(values, lanes, [=](i64 c, vec v, i64 n) {
                 if (!first) v += load(sum + c);
                 if (last)
                   store_first(to + c, v * scale, n);
                 else
                   store(sum + c, v);
               });
             });
}

inline void attend_backward(const HeadGradient& h, const AttentionBackwardScratch& s) {
  const i64 hd = h.head_dim;
  const float scale = 1.0f / __builtin_sqrtf(float(hd)), scale_log2 = 1.44269504088896f * scale;
  const i64 step = round_up(ceil_div(h.window, ceil_div(h.window, kSuperBlock)), kLanes);
  const bool pack = in_panels(hd) && h.window > kMaxQueries;
  const auto right = [&](const float* rows, i64 count, float* to) {
    return pack ? pack_rows(rows, count, hd, to) : RightRows{rows, kTileColumns, hd};
  };
  for (i64 query = 0; query < h.window; query += step) {
    const i64 queries = min_of(step, h.window - query);
    query_blocks(queries, [&](auto vecs, i64 at, i64 count) {
      constexpr int width = decltype(vecs)::count;
      transpose_rows<width>(h.query + (query + at) * hd, hd, count, hd, scale_log2, s.queries + at * hd);
      transpose_rows<width>(h.grad + (query + at) * hd, hd, count, hd, 1.0f, s.grads + at * hd);
    });
    const RightRows query_rows = right(h.query + query * hd, queries, s.query_panels);
    const RightRows grad_rows = right(h.grad + query * hd, queries, s.grad_panels);
    const bool last_query = query + queries == h.window;
    for (i64 first = 0; first < h.window; first += kKeyBlock) {
      const i64 keys = min_of(kKeyBlock, h.window - first);
      query_blocks(queries, [&](auto vecs, i64 at, i64 count) {
        score_gradients<decltype(vecs)::count>(h, query, at, count, first, keys, s);
      });
      key_gradients(h, s, query_rows, grad_rows, queries, first, keys, scale, query == 0, last_query);
      query_gradients(h, s, right(h.key + first * hd, keys, s.key_panels), query, queries, keys, scale, first == 0,
                      first + keys == h.window);
    }
  }
}

CAST_ISA_END
