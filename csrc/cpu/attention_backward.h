// Gradients of softmax attention of one head in one window.
//
// As in attention.h lanes run over queries: P^T and dS^T are [key][query]. They are kept for kSuperBlock queries and
// kKeyBlock keys at a time, so that all five products run at tile speed and memory never grows with the window.
#pragma once

#include "attention.h"

CAST_ISA_BEGIN

constexpr i64 kSuperBlock = (112 + kMaxQueries - 1) / kMaxQueries * kMaxQueries;
constexpr i64 kScoreStride = kSuperBlock + 16;  // row tiles read past the last query

struct AttentionBackwardScratch {
  float *queries, *grads;   // [head_dim][kMaxQueries]: scaled queries, output gradients
  float *weights, *slopes;  // [kKeyBlock + 16][kScoreStride]: P^T, dS^T
  float *dkey, *dvalue;     // [kKeyBlock][round_up(head_dim, kTileColumns)]: sums over super-blocks
};

CAST_INLINE i64 attention_backward_scratch_size(i64 head_dim) {
  return 2 * align16(head_dim * kMaxQueries) + 2 * align16((kKeyBlock + 16) * kScoreStride) +
         2 * align16(kKeyBlock * round_up(head_dim, kTileColumns));
}

CAST_INLINE AttentionBackwardScratch attention_backward_scratch(float* at, i64 head_dim) {
  AttentionBackwardScratch s;
  s.queries = at;
  s.grads = s.queries + align16(head_dim * kMaxQueries);
  s.weights = s.grads + align16(head_dim * kMaxQueries);
  s.slopes = s.weights + align16((kKeyBlock + 16) * kScoreStride);
  s.dkey = s.slopes + align16((kKeyBlock + 16) * kScoreStride);
  s.dvalue = s.dkey + align16(kKeyBlock * round_up(head_dim, kTileColumns));
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

// P^T and dS^T of one block of queries against one block of keys, into columns `column` of the scratch.
template <int Vecs>
inline void score_gradients(const HeadGradient& h, i64 first_query, i64 queries, i64 first_key, i64 keys,
                            float scale_log2, const AttentionBackwardScratch& s, i64 column) {
  constexpr int rows = Vecs == 1 ? 8 : kScoreRows;
  constexpr i64 width = Vecs * kLanes;
  transpose_rows<Vecs>(h.query + first_query * h.head_dim, h.head_dim, queries, h.head_dim, scale_log2, s.queries);
  transpose_rows<Vecs>(h.grad + first_query * h.head_dim, h.head_dim, queries, h.head_dim, 1.0f, s.grads);
  // The softmax of a single score is constant: its slope is zero exactly, not the difference of two roundings.
  const float slope = h.window == 1 ? 0.0f : 1.0f;
  vec maximum[Vecs], inverse[Vecs], delta[Vecs];
  for (int c = 0; c < Vecs; ++c) {
    const i64 at = first_query + c * kLanes, lanes = max_of(queries - c * kLanes, i64(0));
    maximum[c] = load_first(h.row_max + at, lanes);
    inverse[c] = load_first(h.inverse_sum + at, lanes);
    delta[c] = load_first(h.delta + at, lanes);
  }
  for (i64 j = 0; j < keys; j += rows) {
    vec acc[rows][Vecs];
    float* weights = s.weights + j * kScoreStride + column;
    announce_reads(h.key + (first_key + j) * h.head_dim, min_of(rows, keys - j), h.head_dim, h.head_dim);
    multiply(acc, h.key + (first_key + j) * h.head_dim, h.head_dim, 1, s.queries, width, h.head_dim);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < Vecs; ++c) store(weights + r * kScoreStride + c * kLanes, acc[r][c]);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < Vecs; ++c) {
        float* at = weights + r * kScoreStride + c * kLanes;
        store(at, exp2(load(at) - maximum[c]) * inverse[c]);
      }
    announce_reads(h.value + (first_key + j) * h.head_dim, min_of(rows, keys - j), h.head_dim, h.head_dim);
    multiply(acc, h.value + (first_key + j) * h.head_dim, h.head_dim, 1, s.grads, width, h.head_dim);
    float* slopes = s.slopes + j * kScoreStride + column;
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

// out(row, column, vectors, lanes) of left^T-or-left @ right for row tiles of attention's small matrices.
template <class Out>
inline void small_gemm(const float* left, i64 row_stride, i64 depth_stride, i64 rows, const float* right, i64 ldb,
                       i64 columns, i64 depth, const Out& out) {
  for (i64 column = 0; column < columns; column += kTileColumns)
    for (i64 row = 0; row < rows; row += kTileRows) {
      vec acc[kTileRows][kTileVecs];
      announce_reads(right + column, depth, ldb, min_of(kTileColumns, columns - column));
      multiply(acc, left + row * row_stride, row_stride, depth_stride, right + column, ldb, depth);
      emit(acc, row, rows, column, columns, out);
    }
}

// Adds one super-block's share to the key and value gradients of a block of keys; the last share goes to the result.
inline void key_gradients(const HeadGradient& h, const AttentionBackwardScratch& s, i64 first_query, i64 queries,
                          i64 first_key, i64 keys, float scale, bool first, bool last) {
  const i64 stride = round_up(h.head_dim, kTileColumns);
  const auto collect = [&](float* sums, float* result, float factor) {
    return [=, &h](i64 j, i64 column, auto& row, i64 lanes) {
      float* sum = sums + j * stride + column;
      float* to = result + h.answering[first_key + j] + column;
      each(row, lanes, [=](i64 c, vec v, i64 n) {
        if (!first) v += load(sum + c);
        if (last)
          store_first(to + c, v * factor, n);
        else
          store(sum + c, v);
      });
    };
  };
  small_gemm(s.weights, kScoreStride, 1, keys, h.grad + first_query * h.head_dim, h.head_dim, h.head_dim, queries,
             collect(s.dvalue, h.dvalue, 1.0f));
  small_gemm(s.slopes, kScoreStride, 1, keys, h.query + first_query * h.head_dim, h.head_dim, h.head_dim, queries,
             collect(s.dkey, h.dkey, scale));
}

inline void attend_backward(const HeadGradient& h, const AttentionBackwardScratch& s) {
  const float scale = 1.0f / __builtin_sqrtf(float(h.head_dim)), scale_log2 = 1.44269504088896f * scale;
  const i64 step = round_up(ceil_div(h.window, ceil_div(h.window, kSuperBlock)), kLanes);
  for (i64 first_key = 0; first_key < h.window; first_key += kKeyBlock) {
    const i64 keys = min_of(kKeyBlock, h.window - first_key);
    for (i64 query = 0; query < h.window; query += step) {
      const i64 queries = min_of(step, h.window - query);
      for (i64 i = 0; i < queries; i += kMaxQueries) {
        const i64 left = min_of(kMaxQueries, queries - i);
        if (left > kLanes)
          score_gradients<kScoreVecs>(h, query + i, left, first_key, keys, scale_log2, s, i);
        else
          score_gradients<1>(h, query + i, left, first_key, keys, scale_log2, s, i);
      }
      key_gradients(h, s, query, queries, first_key, keys, scale, query == 0, query + queries == h.window);
      small_gemm(s.slopes, 1, kScoreStride, queries, h.key + first_key * h.head_dim, h.head_dim, h.head_dim, keys,
                 [&](i64 i, i64 column, auto& row, i64 lanes) {
                   float* to = h.dquery + h.asking[query + i] + column;
                   each(row, lanes, [=](i64 c, vec v, i64 n) {
                     store_first(to + c, first_key ? load_first(to + c, n) + v * scale : v * scale, n);
                   });
                 });
    }
  }
}

CAST_ISA_END
