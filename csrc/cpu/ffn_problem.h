// One FFN call: sizes, parameter pointers and the layout of `saved`.
#pragma once

#include "base.h"

namespace cast::cpu {

enum : int { kGelu = 0, kQuickGelu = 1 };
// The block's FFN and its adapter have one structure: into a hidden width, activation, and back.
enum : int { kFFN = 0, kAdapter = 1 };

struct FFNProblem {
  i64 rows, dim;
  i64 width[2];    // hidden widths of the FFN and of the adapter (0: no adapter)
  int activation;  // the FFN's; the adapter's is GELU
  bool keep;       // forward keeps the values before both activations
  float eps, adapter_scale;
  bool bf16;       // dense products may round their operands to bfloat16
};

// T is `const float*` for parameters and `float*` for their gradients (null: not wanted).
template <class T>
struct BranchTensors {
  T in_weight, in_bias, out_weight, out_bias;
};

// Field order is that of FFNParameters in cast_kernels/problem.py; the bindings copy 10 pointers over it.
template <class T>
struct FFNTensors {
  T norm_weight, norm_bias;
  BranchTensors<T> branch[2];
};
using FFNParameters = FFNTensors<const float*>;
using FFNGradients = FFNTensors<float*>;
static_assert(sizeof(FFNParameters) == 10 * sizeof(void*), "10 parameters travel as 10 pointers");

struct FFNForwardCall {
  FFNProblem problem;
  FFNParameters parameters;
  const float* x;
  const float* row_scale;  // [rows], or null
  float* y;
  float* saved;  // ffn_saved_layout().total floats, or null
  int threads;
};

struct FFNBackwardCall {
  FFNProblem problem;
  FFNParameters parameters;
  const float* x;
  const float* row_scale;
  const float* saved;
  const float* grad_y;
  float* grad_x;  // null: not wanted
  FFNGradients gradients;
  int threads;
};

// Offsets in floats. cast_kernels/cpu/ffn.py computes the total in Python.
struct FFNSavedLayout {
  i64 hidden[2];   // [rows, width], before the activation, if the problem keeps them
  i64 statistics;  // [rows, 2]: LayerNorm's mean and 1 / deviation
  i64 total;
};
static inline FFNSavedLayout ffn_saved_layout(const FFNProblem& p) {
  FFNSavedLayout l{};
  i64 at = 0;
  for (int b = 0; b < 2; ++b) l.hidden[b] = take(at, p.keep ? p.rows * p.width[b] : 0);
  l.statistics = take(at, 2 * p.rows);
  l.total = at;
  return l;
}

}  // namespace cast::cpu
