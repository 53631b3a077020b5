// Self-attention backward: forward's phases mirrored, then the sums over rows, per group of batch entries.
//
// 1 rows:      output gradient -> adapter -> output projection -> gradient of attention's output
// 2 attention: one head of one entry -> gradients of queries, keys, values
// 3 rows:      -> query-key-value layer -> LayerNorm -> input gradient
// 4 sums:      weights, biases, LayerNorm parameters
#pragma once

#include "self_attention_plan.h"

CAST_ISA_BEGIN

// Recomputes the values that forward did not keep, for rows first .. first + count - 1 of the group, with the same
// bits.
inline void recompute_rows(const SelfBackwardRun& run, i64 first, i64 count, float* scratch) {
  const SelfAttentionProblem& p = run.call.problem;
  const SelfAttentionParameters& w = run.call.parameters;
  const i64 D = p.dim, A = p.adapter;
  if (p.recompute == kAll && self_wanted(run.call).inner)
    project_qkv(p, w, run.weights.again.qkv, run.input, first, count, run.qkv, nullptr,
                scratch + align16(2 * kRowBlock), reinterpret_cast<i64*>(scratch));
  if (!A || p.recompute == kNothing) return;
  float *projected = run.projected + first * D, *hidden = run.hidden + first * A;
  gemm(run.attended + first * D, D, count, run.weights.again.proj, w.proj_bias,
       [=](i64 row, i64 column, auto& v, i64 lanes) { store_row(projected + row * D + column, v, lanes); });
  gemm(projected, D, count, run.weights.again.down, w.down_bias,
       [=](i64 row, i64 column, auto& v, i64 lanes) { store_row(hidden + row * A + column, v, lanes); });
}

inline void self_backward_output(const SelfBackwardRun& run, i64 task, float* scratch) {
  const SelfAttentionProblem& p = run.call.problem;
  const i64 D = p.dim, A = p.adapter, hd = head_dim(p);
  const i64 first = task * kRowBlock, count = min_of(kRowBlock, run.rows - first);
  recompute_rows(run, first, count, scratch);
  i64* slots = reinterpret_cast<i64*>(scratch);
  float* copy = scratch + align16(2 * kRowBlock);
  const float* grad = whole_tiles(run.grad_output + first * D, count, D, copy);
  if (A) {
    const float* hidden = run.hidden + first * A;
    float *grad_hidden = run.grad_hidden + first * A, *da = run.grad_projected + first * D;
    gemm(grad, D, count, run.weights.up, nullptr, [=](i64 row, i64 column, auto& v, i64 lanes) {
      const i64 at = row * A + column;
      each(v, lanes, [=](i64 c, vec y, i64 n) {
        store_first(grad_hidden + at + c, y * gelu_slope(load_first(hidden + at + c, n)), n);
      });
    });
    gemm(grad_hidden, A, count, run.weights.down, nullptr, [=](i64 row, i64 column, auto& v, i64 lanes) {
      const i64 at = row * D + column;
      each(v, lanes, [=](i64 c, vec y, i64 n) { store_first(da + at + c, y + load_first(grad + at + c, n), n); });
    });
    grad = da;
  }
  if (!self_wanted(run.call).inner) return;
  for (i64 r = 0; r < count; ++r) slots[r] = (first + r) / p.tokens * p.tokens * D + (first + r) % p.tokens * hd;
  to_heads(grad, D, count, run.weights.proj, nullptr, hd, p.tokens * hd, slots, run.grad_attended);
}

inline void self_backward_attention(const SelfBackwardRun& run, i64 task, float* scratch) {
  const SelfAttentionProblem& p = run.call.problem;
  const i64 D = p.dim, hd = head_dim(p), matrix = p.tokens * hd, entry = task / p.heads, head = task % p.heads;
  i64* offsets = reinterpret_cast<i64*>(scratch);
  float* delta = scratch + align16(2 * p.tokens);
  const AttentionBackwardScratch buffers = attention_backward_scratch(delta + align16(p.tokens), hd);
  for (i64 i = 0; i < p.tokens; ++i) offsets[i] = (entry * p.tokens + i) * 3 * D;
  const float* grad = run.grad_attended + task * matrix;
  row_products(run.attended + entry * p.tokens * D + head * hd, D, grad, p.tokens, hd, delta);
  const float* query = run.qkv + (entry * 3 * p.heads + head) * matrix;
  const i64 statistic = task * p.tokens;
  float* result = run.grad_qkv + head * hd;
  attend_backward(
      {query, query + p.heads * matrix, query + 2 * p.heads * matrix, grad, run.row_max + statistic,
       run.inverse_sum + statistic, delta, p.tokens, hd, result, result + D, result + 2 * D, offsets, offsets},
      buffers);
}

inline void self_backward_input(const SelfBackwardRun& run, i64 task, float* scratch) {
  const SelfAttentionProblem& p = run.call.problem;
  const i64 D = p.dim, first = task * kRowBlock, count = min_of(kRowBlock, run.rows - first);
  float *dn = scratch, *normed = scratch + align16(kRowBlock * D), *sums = run.norm_sums + task * 2 * D;
  gemm(run.grad_qkv + first * 3 * D, 3 * D, count, run.weights.qkv, nullptr,
       [=](i64 row, i64 column, auto& v, i64 lanes) { store_row(dn + row * D + column, v, lanes); });
  __builtin_memset(sums, 0, sizeof(float) * size_t(2 * D));
  float* grad_input = run.call.grad_input;
  if (grad_input) grad_input += (run.first_entry * p.tokens + first) * D;
  for (i64 r = 0; r < count; ++r) {
    const float* x = run.input + (first + r) * D;
    const RowStatistics s = run.row(first + r);
    float* du = dn + r * D;
    for (i64 c = 0; c < D; c += kLanes) store_first(normed + c, (load_first(x + c, D - c) - s.mean) * s.rstd, D - c);
    normalise_row_backward(du, normed, s.rstd, D, run.call.parameters.norm_weight, du, sums, sums + D);
    if (grad_input) add_rows(du, run.grad_output + (first + r) * D, D, grad_input + r * D);
  }
}

// The sums over rows: four layers, then LayerNorm's shares.
enum : int { kSelfQkv, kSelfProj, kSelfDown, kSelfUp, kSelfLayers };

inline LayerGradient self_layer(const SelfBackwardRun& run, int which) {
  const SelfAttentionProblem& p = run.call.problem;
  const SelfAttentionGradients& g = run.call.gradients;
  const i64 D = p.dim, A = p.adapter;
  if (which == kSelfQkv) return {3 * D, D, g.qkv_weight, g.qkv_bias, run.grad_qkv, 3 * D, nullptr, p.bf16};
  if (which == kSelfProj) return {D, D, g.proj_weight, g.proj_bias, run.da(), D, nullptr, p.bf16};
  if (which == kSelfDown) return {A, D, g.down_weight, g.down_bias, run.grad_hidden, A, nullptr, p.bf16};
  return {D, A, g.up_weight, g.up_bias, run.grad_output, D, nullptr, p.bf16};
}

inline void self_sum_layer(const SelfBackwardRun& run, int which, i64 task, float* scratch) {
  const LayerGradient layer = self_layer(run, which);
  const i64 D = run.call.problem.dim, A = run.call.problem.adapter;
  const bool add = run.first_entry > 0;
  const auto sum = [&](const auto& value_at) { add_layer_gradient(layer, run.rows, task, add, scratch, value_at); };
  const SelfAttentionParameters& w = run.call.parameters;
  if (which == kSelfQkv)
    return sum([&](i64 r, i64 c, i64 lanes) {
      return normalised(run.input + r * D, run.row(r), w.norm_weight, w.norm_bias, c, lanes);
    });
  if (which == kSelfUp)
    return sum(
        [hidden = run.hidden, A](i64 r, i64 c, i64 lanes) { return gelu(load_first(hidden + r * A + c, lanes)); });
  const float* rows = which == kSelfProj ? run.attended : run.projected;
  sum([rows, D](i64 r, i64 c, i64 lanes) { return load_first(rows + r * D + c, lanes); });
}

inline void self_sum_norm(const SelfBackwardRun& run) {
  const i64 D = run.call.problem.dim;
  float* const results[2] = {run.call.gradients.norm_weight, run.call.gradients.norm_bias};
  for (int which = 0; which < 2; ++which) {
    if (!results[which]) continue;
    if (!run.first_entry) __builtin_memset(results[which], 0, sizeof(float) * size_t(D));
    for (i64 block = 0; block < ceil_div(run.rows, kRowBlock); ++block)
      add_into(results[which], run.norm_sums + (2 * block + which) * D, D);
  }
}

inline void self_backward_sums(const SelfBackwardRun& run, float* scratch, i64 scratch_size) {
  i64 first_task[kSelfLayers + 1] = {};
  for (int which = 0; which < kSelfLayers; ++which)
    first_task[which + 1] = first_task[which] + layer_gradient_tasks(self_layer(run, which));
  const i64 layers = first_task[kSelfLayers];
  parallel_for(layers + 1, run.call.threads, [&](i64 task, int thread) {
    if (task == layers) return self_sum_norm(run);
    int which = kSelfLayers - 1;
    while (first_task[which] > task) --which;
    self_sum_layer(run, which, task - first_task[which], scratch + thread * scratch_size);
  });
}

inline void self_attention_backward(const SelfAttentionBackward& call, float* workspace) {
  const SelfAttentionProblem& p = call.problem;
  const SelfBackwardWeights weights = pack_self_backward(call, workspace);
  float* stage = workspace + self_backward_weights_size(p);
  float* scratch = stage + self_stage(p).total;
  const i64 scratch_size = self_backward_scratch_size(p);
  const SelfWanted wanted = self_wanted(call);
  for (i64 first = 0; first < p.batch; first += entries_in_flight(p)) {
    const SelfBackwardRun run = self_backward_run(call, weights, stage, first);
    const i64 blocks = ceil_div(run.rows, kRowBlock);
    // Lambdas, not function names: the compiler must assume that a call through a pointer throws, and the level would
    // refer to symbols of the C++ runtime.
    const auto phase = [&](i64 tasks, const auto& body) {
      parallel_for(tasks, call.threads, [&](i64 task, int thread) { body(task, scratch + thread * scratch_size); });
    };
    phase(blocks, [&](i64 task, float* own) { self_backward_output(run, task, own); });
    if (wanted.inner)
      phase(run.entries * p.heads, [&](i64 task, float* own) { self_backward_attention(run, task, own); });
    if (wanted.norm) phase(blocks, [&](i64 task, float* own) { self_backward_input(run, task, own); });
    self_backward_sums(run, scratch, scratch_size);
  }
}

CAST_ISA_END
