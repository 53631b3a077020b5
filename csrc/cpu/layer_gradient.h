// Gradients of one linear layer from plain matrices: weight [outs, ins] = left^T right and bias = column sums of left,
// over any number of rows, on the tiles of weight_gradient.h.
//
// Tasks own blocks of the result and walk all rows in one fixed order, so bits depend neither on the number of threads
// nor on which other gradients are wanted.
#pragma once

#include "weight_gradient.h"

CAST_ISA_BEGIN

struct LayerGradient {
  i64 outs, ins;
  float *weight, *bias;  // null: not wanted
  const float* left;     // [rows, outs]: the gradient of the layer's output
  i64 left_stride;
  const float* factor;   // times each row of left, or null
  bool bf16;             // products may round their operands to bfloat16
};

CAST_INLINE i64 layer_gradient_tasks(const LayerGradient& g) {
  if (g.weight) return weight_blocks(g.outs, g.ins);
  return g.bias ? ceil_div(g.outs, kOutBlock) : 0;
}

// Task `task` of the layer's gradient, (+)= over `rows` rows. value_at(row, column, lanes) is the layer's input, a
// vector with `lanes` valid lanes; `add` is false for the first rows of all; `scratch` holds weight_scratch_size()
// floats.
template <class ValueAt>
void add_layer_gradient(const LayerGradient& g, i64 rows, i64 task, bool add, float* scratch, const ValueAt& value_at) {
  const WeightScratch s = weight_scratch(scratch, g.bf16);
  // Without a weight the tasks are blocks of the bias, cut as for one column.
  const WeightBlock block = weight_block(g.outs, g.weight ? g.ins : 1, task);
  const bool sum_bias = g.bias && block.in == 0;
  const i64 chunk = ceil_div(rows, ceil_div(rows, kChunk));
  for (i64 first = 0; first < rows; first += chunk) {
    ChunkRows part;
    part.count = min_of(chunk, rows - first);
    for (i64 r = 0; r < part.count; ++r) {
      part.left[r] = g.left + (first + r) * g.left_stride + block.out;
      part.factor[r] = g.factor ? g.factor[first + r] : 1.0f;
    }
    take_left(s, part, block.outs, g.weight != nullptr, sum_bias);
    if (sum_bias) {
      if (!add) __builtin_memset(g.bias + block.out, 0, sizeof(float) * size_t(block.outs));
      add_into(g.bias + block.out, s.chunk, block.outs);
    }
    if (g.weight)
      add_chunk(s, part.count, block, g.ins, g.weight, add,
                [&](i64 r, i64 column, i64 lanes) { return value_at(first + r, column, lanes); });
    add = true;
  }
}

CAST_ISA_END
