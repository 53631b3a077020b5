// The register tile and the loop over it. Every product, attention's included, is a `multiply`.
#pragma once

#include "announce.h"
#include "bf16.h"
#include "workspace.h"

CAST_ISA_BEGIN

struct NoStep {
  CAST_INLINE void operator()(i64) const {}
};

CAST_INLINE vec multiply_add(vec sum, float left, vec right) { return sum + left * right; }
CAST_INLINE vec multiply_add(vec sum, std::uint32_t left, vec right) { return dot_pairs(sum, left, right); }

// acc[r][c] = start[c] + sum over k < depth of a[r * row_stride + k * depth_stride] * b[k * ldb + c * kLanes ...]. `a`
// holds floats, or words of two bfloat16 depths: then depth, depth_stride and ldb count pairs. Strides that are
// literals at the call fold into the addresses. each_step(k) runs in every step. Measured with one thread: 98 % of the
// multiply-add ceiling for depth 384 and 768; blocking the panel for L1 gained nothing.
template <int R, int C, class Left, class EachStep = NoStep>
CAST_TILE void multiply(vec (&acc)[R][C], const vec (&start)[C], const Left* a, i64 row_stride, i64 depth_stride,
                        const float* b, i64 ldb, i64 depth, const EachStep& each_step = {}) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = start[c];
#pragma GCC unroll 4
  for (i64 k = 0; k < depth; ++k) {
    vec right[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) right[c] = load(b + c * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Left left = a[r * row_stride];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = multiply_add(acc[r][c], left, right[c]);
    }
    each_step(k);
    a += depth_stride;
    b += ldb;
  }
}

template <int R, int C>
CAST_INLINE void multiply(vec (&acc)[R][C], const float* a, i64 row_stride, i64 depth_stride, const float* b, i64 ldb,
                          i64 depth) {
  const vec zero[C] = {};
  multiply(acc, zero, a, row_stride, depth_stride, b, ldb, depth);
}

// Calls f(offset, vector, valid lanes) for each vector of a tile's row that has `lanes` valid lanes.
template <int C, class F>
CAST_INLINE void each(const vec (&row)[C], i64 lanes, const F& f) {
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    if (lanes >= (c + 1) * kLanes)
      f(i64(c * kLanes), row[c], i64(kLanes));
    else if (lanes > c * kLanes)
      f(i64(c * kLanes), row[c], lanes - c * kLanes);
  }
}
template <int C>
CAST_INLINE void store_row(float* to, const vec (&row)[C], i64 lanes) {
  each(row, lanes, [=](i64 c, vec v, i64 n) { store_first(to + c, v, n); });
}

// Calls out(row, column, the row's vectors, valid lanes) for the tile's valid part.
template <int R, int C, class Out>
CAST_INLINE void emit(const vec (&acc)[R][C], i64 row, i64 rows, i64 column, i64 columns, const Out& out) {
  if (row + R <= rows && column + C * kLanes <= columns) {  // literal lanes: the partial-vector branches fold away
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) out(row + r, column, acc[r], i64(C * kLanes));
    return;
  }
  float values[R * C * kLanes];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(values + (r * C + c) * kLanes, acc[r][c]);
  for (i64 r = 0; r < min_of(R, rows - row); ++r) {
    vec part[C];
    for (int c = 0; c < C; ++c) part[c] = load(values + (r * C + c) * kLanes);
    out(row + r, column, part, min_of(C * kLanes, columns - column));
  }
}

// Prefetches the lines of a tile that will be written; the tile's product gives them time to arrive.
CAST_INLINE void prefetch_row(const float* at) {
  for (int c = 0; c < kTileColumns; c += 16) __builtin_prefetch(at + c, 1, 3);
}
CAST_INLINE void prefetch_tile(const float* at, i64 stride, i64 rows) {
  for (i64 r = 0; r < rows; ++r) prefetch_row(at + r * stride);
}

// The block's rows, or a zero-padded copy if the last tile would read past them.
CAST_INLINE const float* whole_tiles(const float* rows, i64 count, i64 width, float* copy) {
  const i64 padded = round_up(count, kTileRows);
  if (padded == count) return rows;
  __builtin_memcpy(copy, rows, sizeof(float) * size_t(count * width));
  __builtin_memset(copy + count * width, 0, sizeof(float) * size_t((padded - count) * width));
  return copy;
}

// A right operand packed in panels [columns / kTileColumns][depth][kTileColumns], zero behind the last column. In
// bfloat16 a row of a panel holds words of two depths, and the panel fills only the first half of its space.
struct Panels {
  const float* data;
  i64 depth, columns;
  i64 panel_stride;  // floats from one panel to the next; more than depth * kTileColumns when `data` is a depth slice
  bool bf16;
};

CAST_INLINE i64 panel_count(i64 columns) { return ceil_div(columns, kTileColumns); }
CAST_INLINE i64 packed_size(i64 depth, i64 columns) { return panel_count(columns) * depth * kTileColumns; }
// Where depth k begins inside a panel; k is even in bfloat16.
CAST_INLINE i64 panel_row(i64 k, bool bf16) { return (bf16 ? k / 2 : k) * kTileColumns; }

// Columns first .. first + columns (`first` at a panel's start), and depths first .. first + depth of all columns.
CAST_INLINE Panels column_slice(const Panels& p, i64 first, i64 columns) {
  return {p.data + first / kTileColumns * p.panel_stride, p.depth, columns, p.panel_stride, p.bf16};
}
CAST_INLINE Panels depth_slice(const Panels& p, i64 first, i64 depth) {
  return {p.data + panel_row(first, p.bf16), depth, p.columns, p.panel_stride, p.bf16};
}

// Longest chain of additions into one accumulator. A deeper sum is made of several chains, which brings the rounding
// error to that of blocked library GEMMs.
constexpr i64 kDepthBlock = 256;

// The tile as a sum of chains, added in memory that stays in L1. product(acc, start, first depth, depth) computes one
// chain.
template <class Product>
CAST_INLINE void sum_chains(vec (&acc)[kTileRows][kTileVecs], const vec (&start)[kTileVecs], i64 depth, i64 chain,
                            const Product& product) {
  product(acc, start, i64(0), min_of(chain, depth));
  if (depth <= chain) return;
  const vec zero[kTileVecs] = {};
  float sum[kTileRows * kTileColumns];
  for (i64 k = chain; k < depth; k += chain) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kTileVecs; ++c) store(sum + r * kTileColumns + c * kLanes, acc[r][c]);
    product(acc, zero, k, min_of(chain, depth - k));
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kTileVecs; ++c) acc[r][c] += load(sum + r * kTileColumns + c * kLanes);
  }
}

// Prefetches the next panel in even steps while one is multiplied. `at` is the first request's address.
struct Ahead {
  const float* at;
  i64 step;
  CAST_INLINE void operator()(i64 k) const { __builtin_prefetch(at + k * step, 0, 2); }
  CAST_INLINE Ahead from(i64 k) const { return {at + k * step, step}; }
};

// Calls tile(acc, start, row, panel, ahead) and then out for every tile of a @ b + bias; see gemm. `steps` is a panel's
// depth in steps of the product.
template <class Tile, class Out, class Before>
CAST_INLINE void each_tile(i64 rows, i64 steps, const Panels& right, const float* bias, const Out& out,
                           const Before& before, const Tile& tile) {
  const i64 ahead_step = ceil_div(kTileColumns, ceil_div(rows, kTileRows));
  for (i64 column = 0; column < right.columns; column += kTileColumns) {
    const float* panel = right.data + column / kTileColumns * right.panel_stride;
    vec start[kTileVecs] = {};
    for (int c = 0; bias && c < kTileVecs; ++c) {
      const i64 at = column + c * kLanes;
      start[c] = load_first(bias + at, max_of(right.columns - at, i64(0)));
    }
    for (i64 row = 0; row < rows; row += kTileRows) {
      for (i64 r = row; r < min_of(row + kTileRows, rows); ++r) before(r, column);
      vec acc[kTileRows][kTileVecs];
      const Ahead first{panel + right.panel_stride, ahead_step};
      tile(acc, start, row, panel, first.from(row / kTileRows * steps));
      emit(acc, row, rows, column, right.columns, out);
    }
  }
}

// Turns the left operand into words once, for all panels.
template <class Out, class Before>
__attribute__((noinline)) void gemm_bf16(const float* a, i64 lda, i64 rows, const Panels& right, const float* bias,
                                         const Out& out, const Before& before) {
  const i64 words = ceil_div(right.depth, 2), tiles = round_up(rows, kTileRows);
  std::uint32_t* left = reinterpret_cast<std::uint32_t*>(thread_buffer(sizeof(float) * std::size_t(tiles * words)));
  pair_rows(a, lda, tiles, right.depth, left);
  const i64 chain = ceil_div(words, ceil_div(right.depth, kDepthBlock));
  each_tile(rows, words, right, bias, out, before,
            [=](auto& acc, auto& start, i64 row, const float* panel, Ahead ahead) {
              sum_chains(acc, start, words, chain, [=](auto& part, auto& from, i64 k, i64 depth) {
                multiply(part, from, left + row * words + k, words, 1, panel + k * kTileColumns, kTileColumns, depth,
                         ahead.from(k));
              });
            });
}

// Calls out(row, column, vectors, lanes) for every part of a row of a @ b + bias (bias may be null). Reads whole row
// tiles: `a` must be readable up to round_up(rows, kTileRows) rows; values of the surplus rows are never used.
// before(row, column) runs before a tile is computed, for each of its rows: the place to prefetch the output.
//
// While the tiles of one panel are computed, the next panel is prefetched evenly, one request a step. Weights of
// several MiB come from the last-level cache or from memory; with the processor's own prefetching every panel's first
// tile waited. Measured for an FFN forward (48 rows a block, D = 768, 18.9 MB of weights, one thread, busy Zen 3): 78
// to 92 GFLOP/s. All requests in one burst before a tile gained nothing.
template <class Out, class Before>
__attribute__((noinline)) void gemm(const float* a, i64 lda, i64 rows, const Panels& b, const float* bias,
                                    const Out& out_at_caller, const Before& before_at_caller) {
  const Out out = out_at_caller;  // copies: the compiler sees that stores through float pointers cannot change them
  const Before before = before_at_caller;
  const Panels right = b;
  if constexpr (kHasBf16)
    if (right.bf16) return gemm_bf16(a, lda, rows, right, bias, out, before);
  const i64 chain = ceil_div(right.depth, ceil_div(right.depth, kDepthBlock));
  each_tile(rows, right.depth, right, bias, out, before,
            [=](auto& acc, auto& start, i64 row, const float* panel, Ahead ahead) {
              const float* left = a + row * lda;
              announce_reads(left, min_of(kTileRows, rows - row), lda, right.depth);
              announce_reads(panel, right.depth, kTileColumns, kTileColumns);
              sum_chains(acc, start, right.depth, chain, [=](auto& part, auto& from, i64 k, i64 depth) {
                multiply(part, from, left + k, lda, 1, panel + k * kTileColumns, kTileColumns, depth, ahead.from(k));
              });
            });
}

template <class Out>
CAST_INLINE void gemm(const float* a, i64 lda, i64 rows, const Panels& b, const float* bias, const Out& out) {
  gemm(a, lda, rows, b, bias, out, [](i64, i64) {});
}

CAST_ISA_END
