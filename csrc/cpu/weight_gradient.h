// Gradients of one linear layer's weight and bias: sums over all rows of the batch.
//
// A task owns a block of the weight and walks all rows in chunks, in one fixed order; the sum never depends on how
// many threads there are. Both operands are packed once per chunk, so elementwise work (GELU, + position, drop-path
// factors, bias sums) rides along.
#pragma once

#include "attention.h"

CAST_ISA_BEGIN

constexpr i64 kChunk = 192;      // rows a chunk: one panel of the right operand stays in L1
constexpr i64 kOutBlock = 384;   // rows of the weight a task owns
constexpr i64 kInBlock = 192;    // columns of the weight a task owns
constexpr i64 kStripStride = kChunk * kTileRows + kLanes;  // whole vectors are stored, the last one spills over

struct WeightScratch {
  float *left, *right, *row, *chain, *chunk;
};

CAST_INLINE i64 weight_scratch_size() {
  return align16(ceil_div(kOutBlock, kTileRows) * kStripStride + 16) + align16(kChunk * kTileColumns) +
         3 * align16(kOutBlock + 16);
}

CAST_INLINE WeightScratch weight_scratch(float* at) {
  WeightScratch s;
  s.left = at;
  s.right = s.left + align16(ceil_div(kOutBlock, kTileRows) * kStripStride + 16);
  s.row = s.right + align16(kChunk * kTileColumns);
  s.chain = s.row + align16(kOutBlock + 16);
  s.chunk = s.chain + align16(kOutBlock + 16);
  return s;
}

struct WeightBlock {
  i64 out, outs, in, ins;
};

CAST_INLINE i64 weight_blocks(i64 outs, i64 ins) { return ceil_div(outs, kOutBlock) * ceil_div(ins, kInBlock); }
CAST_INLINE WeightBlock weight_block(i64 outs, i64 ins, i64 task) {
  const i64 across = ceil_div(ins, kInBlock);
  const i64 out = task / across * kOutBlock, in = task % across * kInBlock;
  return {out, min_of(kOutBlock, outs - out), in, min_of(kInBlock, ins - in)};
}

CAST_INLINE void add_into(float* sum, const float* values, i64 count) {
  for (i64 c = 0; c < count; c += kLanes)
    store_first(sum + c, load_first(sum + c, count - c) + load_first(values + c, count - c), count - c);
}

// left strips [outs / kTileRows][chunk][kTileRows] of `rows` rows; with bias sums if `sum_rows`.
// row_at(r) is row r's first output, or null for a row that counts as zero; factor_at(r) multiplies it.
template <class RowAt, class FactorAt>
inline void pack_left(const WeightScratch& s, i64 rows, i64 outs, bool sum_rows, const RowAt& row_at,
                      const FactorAt& factor_at) {
  if (sum_rows) __builtin_memset(s.chunk, 0, sizeof(float) * size_t(outs));
  for (i64 r = 0; r < rows; ++r) {
    const float* from = row_at(r);
    const float factor = factor_at(r);
    // A copy with slack: vectors may then read past the last output.
    for (i64 c = 0; c < outs; c += kLanes)
      store(s.row + c, from ? load_first(from + c, outs - c) * factor : vec{});
    for (i64 strip = 0; strip * kTileRows < outs; ++strip) {
      float* to = s.left + strip * kStripStride + r * kTileRows;
      for (int c = 0; c < kTileRows; c += kLanes) store(to + c, load(s.row + strip * kTileRows + c));
    }
    if (!sum_rows) continue;
    if (r % kSumChain == 0)
      __builtin_memcpy(s.chain, s.row, sizeof(float) * size_t(outs));
    else
      add_into(s.chain, s.row, outs);
    if (r % kSumChain == kSumChain - 1 || r == rows - 1) add_into(s.chunk, s.chain, outs);
  }
}

// One chunk's share of a block of the weight's gradient. value_at(r, column, lanes) is the right operand; `add` is
// false for the first chunk of all.
template <class ValueAt>
inline void add_chunk(const WeightScratch& s, i64 rows, const WeightBlock& block, i64 ins, float* gradient, bool add,
                      const ValueAt& value_at) {
  for (i64 column = 0; column < block.ins; column += kTileColumns) {
    for (i64 r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kTileVecs; ++c) {
        const i64 at = column + c * kLanes;
        store(s.right + r * kTileColumns + c * kLanes,
              at < block.ins ? value_at(r, block.in + at, min_of(kLanes, block.ins - at)) : vec{});
      }
    for (i64 out = 0; out < block.outs; out += kTileRows) {
      float* to = gradient + (block.out + out) * ins + block.in;
      vec acc[kTileRows][kTileVecs];
      multiply(acc, s.left + out / kTileRows * kStripStride, 1, kTileRows, s.right, kTileColumns, rows);
      emit(acc, out, block.outs, column, block.ins, [&](i64 r, i64 c, vec v, i64 lanes) {
        float* at = to + (r - out) * ins + c;
        store_first(at, add ? load_first(at, lanes) + v : v, lanes);
      });
    }
  }
}

CAST_ISA_END
