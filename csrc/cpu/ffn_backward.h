// FFN backward, per group of row blocks: rows first, then all sums over rows.
//
// 1 rows: hidden values (again, or from `saved`) -> gradients of both branches -> LayerNorm -> input gradient
// 2 sums: weights and biases from phase 1's stages, LayerNorm's parameters from the blocks' shares
#pragma once

#include "ffn_backward_plan.h"
#include "layernorm.h"

CAST_ISA_BEGIN

struct FFNBackwardRun {
  const FFNBackwardCall& call;
  const FFNBackwardPlan& plan;
  const FFNBackwardWeights& weights;
  FFNSavedLayout saved;
  float* stage;
  i64 first_task, tasks;  // row blocks of this group
};

// One thread's buffers for a block of rows.
struct FFNBackwardScratch {
  float *normed, *grad_normed, *grad_y, *hidden, *grad;
};
inline FFNBackwardScratch ffn_backward_scratch(const FFNBackwardRun& run, float* at) {
  const i64 rows = run.plan.cut.rows, wide = align16(rows * run.call.problem.dim);
  return {at, at + wide, at + 2 * wide, at + 3 * wide, at + 3 * wide + align16(rows * kHiddenChunk)};
}

CAST_INLINE RowStatistics saved_statistics(const FFNBackwardRun& run, i64 row) {
  const float* at = run.call.saved + run.saved.statistics + 2 * row;
  return {at[0], at[1]};
}

// A block of rows: where it starts in the batch and in its group.
struct FFNBlock {
  i64 first, local, rows;
};

// A matrix inside a wider one.
struct Rows {
  float* data;
  i64 stride;
};

// grad = the gradient of the value before the activation. If the branch needs it, `grad` holds the gradient of the
// value after the activation on entry. If value.data is not null, value = the value after the activation.
inline void activation_backward(const FFNBackwardRun& run, int branch, i64 rows, i64 width, const float* hidden,
                                i64 hidden_stride, const float* factor, const Rows& grad, const Rows& value) {
  const bool needs_grad = run.plan.needs[branch].grad;
  with_activation(run.call.problem, branch, [&](const auto& activation, const auto& slope) {
    for (i64 r = 0; r < rows; ++r) {
      const float f = factor ? factor[r] : 1.0f;
      for (i64 c = 0; c < width; c += kLanes) {
        const vec x = load_first(hidden + r * hidden_stride + c, width - c);
        if (value.data) store_first(value.data + r * value.stride + c, activation(x), width - c);
        float* at = grad.data + r * grad.stride + c;
        if (needs_grad) store_first(at, load_first(at, width - c) * f * slope(x), width - c);
      }
    }
  });
}

inline void backward_chunk(const FFNBackwardRun& run, int branch, const HiddenChunk& chunk, const FFNBlock& block,
                           const float* grad_y, const FFNBackwardScratch& s) {
  const FFNProblem& p = run.call.problem;
  const FFNStage& stage = run.plan.stage;
  const BranchNeeds& needs = run.plan.needs[branch];
  const i64 D = p.dim, width = p.width[branch], at = block.local * width + chunk.first;
  const float* hidden = s.hidden;
  i64 hidden_stride = chunk.width;
  if (p.keep) {
    hidden = run.call.saved + run.saved.hidden[branch] + block.first * width + chunk.first;
    hidden_stride = width;
  } else {
    gemm(s.normed, D, block.rows, column_slice(run.weights.in[branch], chunk.first, chunk.width),
         run.call.parameters.branch[branch].in_bias + chunk.first,
         [to = s.hidden, hidden_stride](i64 row, i64 column, auto& v, i64 lanes) {
           store_row(to + row * hidden_stride + column, v, lanes);
         });
  }
  const Rows grad = needs.stage_grad ? Rows{run.stage + stage.grad[branch] + at, width} : Rows{s.grad, chunk.width};
  const Rows value{needs.stage_value ? run.stage + stage.value[branch] + at : nullptr, width};
  if (needs.grad)
    gemm(grad_y, D, block.rows, column_slice(run.weights.out_grad[branch], chunk.first, chunk.width), nullptr,
         [=](i64 row, i64 column, auto& v, i64 lanes) { store_row(grad.data + row * grad.stride + column, v, lanes); });
  activation_backward(run, branch, block.rows, chunk.width, hidden, hidden_stride,
                      branch == kAdapter ? run.stage + stage.factor + block.local : nullptr, grad, value);
  if (run.plan.through_norm)
    gemm(grad.data, grad.stride, block.rows, depth_slice(run.weights.in_grad[branch], chunk.first, chunk.width),
         nullptr, [=, sum = s.grad_normed](i64 row, i64 column, auto& v, i64 lanes) {
           float* to = sum + row * D + column;
           each(v, lanes, [=](i64 c, vec part, i64 n) { store_first(to + c, load_first(to + c, n) + part, n); });
         });
}

// The input's gradient from that of the normalised rows. Stores the block's shares of LayerNorm's gradients.
inline void backward_norm(const FFNBackwardRun& run, i64 task, const FFNBlock& block, const FFNBackwardScratch& s) {
  const FFNProblem& p = run.call.problem;
  const i64 D = p.dim;
  float* sums = run.stage + run.plan.stage.norm_sums + task * 2 * D;
  __builtin_memset(sums, 0, sizeof(float) * size_t(2 * D));
  for (i64 r = 0; r < block.rows; ++r) {
    const i64 row = block.first + r;
    const float* x = run.call.x + row * D;
    const RowStatistics statistics = saved_statistics(run, row);
    float* normed = s.normed + r * D;
    float* grad = s.grad_normed + r * D;
    for (i64 c = 0; c < D; c += kLanes)
      store_first(normed + c, (load_first(x + c, D - c) - statistics.mean) * statistics.rstd, D - c);
    normalise_row_backward(grad, normed, statistics.rstd, D, run.call.parameters.norm_weight, grad, sums, sums + D);
    if (run.call.grad_x) add_rows(run.call.grad_y + row * D, grad, D, run.call.grad_x + row * D);
  }
}

inline void ffn_backward_rows(const FFNBackwardRun& run, i64 task, float* scratch) {
  const FFNProblem& p = run.call.problem;
  const FFNBackwardScratch s = ffn_backward_scratch(run, scratch);
  const i64 D = p.dim, first = (run.first_task + task) * run.plan.cut.rows;
  const FFNBlock block{first, task * run.plan.cut.rows, min_of(run.plan.cut.rows, p.rows - first)};

  const float* gamma = run.call.parameters.norm_weight;
  const float* beta = run.call.parameters.norm_bias;
  for (i64 r = 0; r < block.rows; ++r) {
    const i64 row = first + r;
    run.stage[run.plan.stage.factor + block.local + r] =
        p.adapter_scale * (run.call.row_scale ? run.call.row_scale[row] : 1.0f);
    const RowStatistics statistics = saved_statistics(run, row);
    for (i64 c = 0; c < D && !p.keep; c += kLanes)
      store_first(s.normed + r * D + c, normalised(run.call.x + row * D, statistics, gamma, beta, c, D - c), D - c);
  }
  __builtin_memset(s.grad_normed, 0, sizeof(float) * size_t(block.rows * D));
  const float* grad_y = whole_tiles(run.call.grad_y + first * D, block.rows, D, s.grad_y);
  for (int branch = 0; branch < 2; ++branch) {
    if (!run.plan.needs[branch].hidden) continue;
    const i64 width = p.width[branch];
    for (i64 index = 0; index < hidden_chunks(width); ++index)
      backward_chunk(run, branch, hidden_chunk(width, index), block, grad_y, s);
  }
  if (run.plan.through_norm) backward_norm(run, task, block, s);
}

// The layers with gradients that sum over the group's rows. Their tasks come first; one for LayerNorm follows.
struct FFNSums {
  LayerGradient in[2], out[2];
  i64 tasks;
};

inline FFNSums list_ffn_sums(const FFNBackwardRun& run) {
  const FFNProblem& p = run.call.problem;
  const i64 first = run.first_task * run.plan.cut.rows;
  FFNSums sums{};
  for (int b = 0; b < 2; ++b) {
    const auto& wanted = run.call.gradients.branch[b];
    if (!p.width[b]) continue;
    sums.in[b] = {p.width[b], p.dim, wanted.in_weight, wanted.in_bias, run.stage + run.plan.stage.grad[b], p.width[b],
                  nullptr,    p.bf16};
    sums.out[b] = {p.dim,
                   p.width[b],
                   wanted.out_weight,
                   wanted.out_bias,
                   run.call.grad_y + first * p.dim,
                   p.dim,
                   b == kAdapter ? run.stage + run.plan.stage.factor : nullptr,
                   p.bf16};
    sums.tasks += layer_gradient_tasks(sums.in[b]) + layer_gradient_tasks(sums.out[b]);
  }
  sums.tasks += run.call.gradients.norm_weight || run.call.gradients.norm_bias;
  return sums;
}

inline void sum_ffn_norm(const FFNBackwardRun& run) {
  const i64 D = run.call.problem.dim;
  float* const results[2] = {run.call.gradients.norm_weight, run.call.gradients.norm_bias};
  for (int which = 0; which < 2; ++which) {
    if (!results[which]) continue;
    if (run.first_task == 0) __builtin_memset(results[which], 0, sizeof(float) * size_t(D));
    for (i64 task = 0; task < run.tasks; ++task)
      add_into(results[which], run.stage + run.plan.stage.norm_sums + (2 * task + which) * D, D);
  }
}

inline void run_ffn_sum(const FFNBackwardRun& run, const FFNSums& sums, i64 task, float* scratch) {
  const FFNProblem& p = run.call.problem;
  const i64 first = run.first_task * run.plan.cut.rows, rows = min_of(run.tasks * run.plan.cut.rows, p.rows - first);
  const bool add = run.first_task > 0;
  const float* gamma = run.call.parameters.norm_weight;
  const float* beta = run.call.parameters.norm_bias;
  for (int b = 0; b < 2; ++b) {
    const i64 in_tasks = layer_gradient_tasks(sums.in[b]), out_tasks = layer_gradient_tasks(sums.out[b]);
    if (task < in_tasks)
      return add_layer_gradient(sums.in[b], rows, task, add, scratch, [&](i64 row, i64 column, i64 lanes) {
        return normalised(run.call.x + (first + row) * p.dim, saved_statistics(run, first + row), gamma, beta, column,
                          lanes);
      });
    task -= in_tasks;
    const float* value = run.stage + run.plan.stage.value[b];
    if (task < out_tasks)
      return add_layer_gradient(sums.out[b], rows, task, add, scratch, [&](i64 row, i64 column, i64 lanes) {
        return load_first(value + row * p.width[b] + column, lanes);
      });
    task -= out_tasks;
  }
  sum_ffn_norm(run);
}

inline void ffn_backward(const FFNBackwardCall& call, float* workspace) {
  const FFNBackwardPlan plan = plan_ffn_backward(call);
  const FFNBackwardWeights weights = pack_ffn_backward(call, plan, workspace);
  float* stage = workspace + plan.weights;
  float* scratch = stage + plan.stage.total;
  for (i64 first = 0; first < plan.cut.tasks; first += plan.group_tasks) {
    const i64 tasks = min_of(plan.group_tasks, plan.cut.tasks - first);
    const FFNBackwardRun run{call, plan, weights, ffn_saved_layout(call.problem), stage, first, tasks};
    parallel_for(tasks, call.threads,
                 [&](i64 task, int thread) { ffn_backward_rows(run, task, scratch + thread * plan.scratch); });
    const FFNSums sums = list_ffn_sums(run);
    parallel_for(sums.tasks, call.threads,
                 [&](i64 task, int thread) { run_ffn_sum(run, sums, task, scratch + thread * plan.scratch); });
  }
}

CAST_ISA_END
