// Gradients of one linear layer's weight and bias: sums over all rows of the batch.
//
// A task owns a block of the weight and walks all rows in chunks, in one fixed order, so sums do not depend on the
// number of threads. Both operands are packed once per chunk; packing also does elementwise work (GELU, + position,
// drop-path factors, bias sums).
#pragma once

#include "attention.h"

CAST_ISA_BEGIN

constexpr i64 kChunk = 192;      // rows a chunk: one panel of the right operand stays in L1
constexpr i64 kOutBlock = 384;   // rows of the weight a task owns
constexpr i64 kInBlock = 384;    // columns of the weight a task owns
constexpr i64 kRightPanels = 4;  // packed together: one read of a row takes several cache lines
constexpr i64 kStripStride = kChunk * kTileRows + kLanes;  // stores are whole vectors; the last one spills over

struct WeightScratch {
  float *left, *right, *chunk;
  bool bf16;  // operands are words of two rows
};

CAST_INLINE i64 weight_scratch_size() {
  return align16(ceil_div(kOutBlock, kTileRows) * kStripStride + 16) + align16(kRightPanels * kChunk * kTileColumns) +
         align16(kOutBlock);
}

CAST_INLINE WeightScratch weight_scratch(float* at, bool bf16 = false) {
  WeightScratch s;
  s.bf16 = kHasBf16 && bf16;
  s.left = at;
  s.right = s.left + align16(ceil_div(kOutBlock, kTileRows) * kStripStride + 16);
  s.chunk = s.right + align16(kRightPanels * kChunk * kTileColumns);
  return s;
}

// The rows of one chunk. A null left row counts as zero. `right` and `position` are offsets into the layer's input and
// into its position table (negative: nothing to read).
struct ChunkRows {
  i64 count;
  const float* left[kChunk];
  float factor[kChunk];
  i64 right[kChunk], position[kChunk];
};

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

// left strips [outs / kTileRows][chunk][kTileRows] of rows first .. end, each times its factor. `first` is even.
inline void pack_left(const WeightScratch& s, const ChunkRows& rows, i64 first, i64 end, i64 outs) {
  // These strips read whole vectors that end inside the row.
  const i64 whole = max_of(i64(0), (outs - round_up(kTileRows, kLanes)) / kTileRows);
  const auto values = [&](i64 r, i64 strip, i64 at) {
    const float* from = r < end ? rows.left[r] : nullptr;
    if (!from) return vec{};
    return (strip < whole ? load(from + at) : load_first(from + at, max_of(outs - at, i64(0)))) * rows.factor[r];
  };
  for (i64 r = first; r < end; r += s.bf16 ? 2 : 1) {
    float* to = s.left + (s.bf16 ? r / 2 : r) * kTileRows;
    for (i64 strip = 0; strip * kTileRows < outs; ++strip, to += kStripStride)
      for (int c = 0; c < kTileRows; c += kLanes) {
        const i64 at = strip * kTileRows + c;
        const vec v = values(r, strip, at);
        store(to + c, s.bf16 ? pair_words(v, values(r + 1, strip, at)) : v);
      }
  }
}

// Adds rows first .. end, each times its factor, to s.chunk, in one chain of additions.
inline void sum_left(const WeightScratch& s, const ChunkRows& rows, i64 first, i64 end, i64 outs) {
  constexpr int vecs = 4;
  i64 c = 0;
  for (; c + vecs * kLanes <= outs; c += vecs * kLanes) {
    vec sum[vecs] = {};
    for (i64 r = first; r < end; ++r)
      if (rows.left[r])
#pragma GCC unroll 4
        for (int v = 0; v < vecs; ++v) sum[v] += load(rows.left[r] + c + v * kLanes) * rows.factor[r];
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) store(s.chunk + c + v * kLanes, load(s.chunk + c + v * kLanes) + sum[v]);
  }
  for (; c < outs; c += kLanes) {
    vec sum = vec{};
    for (i64 r = first; r < end; ++r)
      if (rows.left[r]) sum += load_first(rows.left[r] + c, outs - c) * rows.factor[r];
    store_first(s.chunk + c, load_first(s.chunk + c, outs - c) + sum, outs - c);
  }
}

// Packs the chunk's left rows if `pack`, leaves their sum in s.chunk if `sum`. It takes a few rows at a time, so that
// the second use finds them in L1.
__attribute__((noinline)) void take_left(const WeightScratch& s, const ChunkRows& rows, i64 outs, bool pack, bool sum) {
  if (sum) __builtin_memset(s.chunk, 0, sizeof(float) * size_t(outs));
  for (i64 first = 0; first < rows.count; first += kSumChain) {
    const i64 end = min_of(first + kSumChain, rows.count);
    if (sum) sum_left(s, rows, first, end, outs);
    if (pack) pack_left(s, rows, first, end, outs);
  }
}

// right panels [.][chunk][kTileColumns] of columns from, from + 1, ..., to - 1; zero behind the last.
template <class ValueAt>
__attribute__((noinline)) void pack_right(const WeightScratch& s, i64 rows, i64 from, i64 to, const ValueAt& value_at) {
  const auto values = [&](i64 r, i64 at) {
    if (at + kLanes <= to) return value_at(r, at, i64(kLanes));
    return at < to ? value_at(r, at, to - at) : vec{};
  };
  for (i64 r = 0; r < rows; r += s.bf16 ? 2 : 1) {
    float* panel = s.right + panel_row(r, s.bf16);
    for (i64 column = from; column < to; column += kTileColumns, panel += kChunk * kTileColumns)
#pragma GCC unroll 4
      for (int c = 0; c < kTileVecs; ++c) {
        const i64 at = column + c * kLanes;
        const vec v = values(r, at);
        store(panel + c * kLanes, s.bf16 ? pair_words(v, r + 1 < rows ? values(r + 1, at) : vec{}) : v);
      }
  }
}

CAST_INLINE void multiply_rows(vec (&acc)[kTileRows][kTileVecs], const WeightScratch& s, const float* left,
                               const float* right, i64 rows) {
  const vec zero[kTileVecs] = {};
  if constexpr (kHasBf16)
    if (s.bf16) {
      const std::uint32_t* words = reinterpret_cast<const std::uint32_t*>(left);
      return multiply(acc, zero, words, 1, kTileRows, right, kTileColumns, ceil_div(rows, 2));
    }
  multiply(acc, zero, left, 1, kTileRows, right, kTileColumns, rows);
}

// Adds one chunk's share to a block of the weight's gradient. value_at(r, column, lanes) is the right operand's row r;
// `add` is false for the first chunk of all.
template <class ValueAt>
__attribute__((noinline)) void add_chunk(const WeightScratch& s, i64 rows, const WeightBlock& block, i64 ins,
                                         float* gradient, bool add, const ValueAt& value_at) {
  const i64 end = block.in + block.ins;
  for (i64 group = block.in; group < end; group += kRightPanels * kTileColumns) {
    const i64 group_end = min_of(group + kRightPanels * kTileColumns, end);
    pack_right(s, rows, group, group_end, value_at);
    for (i64 column = group; column < group_end; column += kTileColumns) {
      const float* right = s.right + (column - group) * kChunk;
      for (i64 out = 0; out < block.outs; out += kTileRows) {
        float* to = gradient + (block.out + out) * ins;
        vec acc[kTileRows][kTileVecs];
        if (add) prefetch_tile(to + column, ins, min_of(kTileRows, block.outs - out));
        multiply_rows(acc, s, s.left + out / kTileRows * kStripStride, right, rows);
        emit(acc, out, block.outs, column, end, [=](i64 r, i64 c, auto& row, i64 lanes) {
          float* at = to + (r - out) * ins + c;
          each(row, lanes, [=](i64 v, vec x, i64 n) { store_first(at + v, add ? load_first(at + v, n) + x : x, n); });
        });
      }
    }
  }
}

CAST_ISA_END
