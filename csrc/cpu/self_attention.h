// One expert block's self-attention with its serial adapter: sizes, parameter pointers, and the layout of `saved`.
//
//   a = softmax(q k^T / sqrt(head_dim)) v Wp^T + bp,   [q|k|v] = LayerNorm(x) Wqkv^T + bqkv
//   y = x + a + gelu(a Wd^T + bd) Wu^T + bu
//
// Plain data and functions with internal linkage only, for the reason in base.h.
#pragma once

#include "base.h"

namespace cast::cpu {

struct SelfAttentionProblem {
  i64 batch, tokens, dim, heads, adapter;  // adapter: its width, 0 where there is none
  Recompute recompute;
  float eps;
  bool bf16;  // dense products may round their operands to bfloat16
};

// Field order is SelfAttentionParameters of cast_kernels/problem.py. Null: absent, or a gradient that is not wanted.
template <class T>
struct SelfAttentionTensors {
  T norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, down_weight, down_bias, up_weight, up_bias;
};
using SelfAttentionParameters = SelfAttentionTensors<const float*>;
using SelfAttentionGradients = SelfAttentionTensors<float*>;
static_assert(sizeof(SelfAttentionParameters) == 10 * sizeof(void*), "10 parameters travel as 10 pointers");

struct SelfAttentionForward {
  SelfAttentionProblem problem;
  SelfAttentionParameters parameters;
  const float* input;  // [batch, tokens, dim]
  float* output;
  float* saved;  // [self_attention_saved], or null
  int threads;
};

struct SelfAttentionBackward {
  SelfAttentionProblem problem;
  SelfAttentionParameters parameters;
  const float *input, *saved, *grad_output;
  float* grad_input;  // null: not wanted
  SelfAttentionGradients gradients;
  int threads;
};

static inline i64 head_dim(const SelfAttentionProblem& p) { return p.dim / p.heads; }
static inline i64 all_rows(const SelfAttentionProblem& p) { return p.batch * p.tokens; }

// Batch entries that pass through the phases together: memory between phases stays a few times 1600 rows, about one
// clip. The number of threads must not matter: sums over rows are cut at groups.
static inline i64 entries_in_flight(const SelfAttentionProblem& p) {
  const i64 fit = 1600 / p.tokens, most = p.batch < 1 ? 1 : p.batch;
  return fit < 1 ? 1 : fit < most ? fit : most;
}

// Each field is the offset of a part in one buffer, in floats. A part that is not kept has size zero.
struct SelfAttentionSaved {
  i64 qkv;                   // [batch][3 * heads][tokens][head_dim]: three contiguous matrices for a head
  i64 attended;              // [rows, dim], before the output projection
  i64 row_max, inverse_sum;  // [batch][heads][tokens], base-2 softmax statistics
  i64 statistics;            // [rows][2], LayerNorm's mean and 1 / standard deviation
  i64 projected, hidden;     // [rows, dim], the adapter's input; [rows, adapter], before GELU
  i64 total;
};

// Row tiles and vectors may read up to this much past a matrix; they never use these values.
static inline i64 read_slack(const SelfAttentionProblem& p) {
  return 16 * (p.dim > p.adapter ? p.dim : p.adapter) + 64;
}

// Forward zeroes the slack at the end. cast_kernels/cpu/self_attention.py computes the same total in Python.
static inline SelfAttentionSaved saved_layout(const SelfAttentionProblem& p) {
  SelfAttentionSaved l{};
  i64 at = 0;
  const i64 rows = all_rows(p);
  l.qkv = take(at, p.recompute == kAll ? 0 : rows * 3 * p.dim);
  l.attended = take(at, rows * p.dim);
  l.row_max = take(at, rows * p.heads);
  l.inverse_sum = take(at, rows * p.heads);
  l.statistics = take(at, 2 * rows);
  const bool adapted = p.adapter > 0 && p.recompute == kNothing;
  l.projected = take(at, adapted ? rows * p.dim : 0);
  l.hidden = take(at, adapted ? rows * p.adapter : 0);
  l.total = at + read_slack(p);
  return l;
}

// The interface for the bindings. The functions throw std::invalid_argument for wrong sizes and for missing pointers,
// std::bad_alloc if scratch memory cannot be had.
void check_problem(const SelfAttentionProblem& problem);
i64 self_attention_saved(const SelfAttentionProblem& problem);  // floats
void run_self_attention(const SelfAttentionForward& call);
// Writes every gradient with a pointer that is not null; an empty batch writes nothing.
void run_self_attention_backward(const SelfAttentionBackward& call);

}  // namespace cast::cpu
