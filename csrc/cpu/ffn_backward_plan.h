// Wanted work of one FFN backward call, its memory, and its packed weights.
#pragma once

#include "ffn_plan.h"
#include "layer_gradient.h"

CAST_ISA_BEGIN

// Values of a branch that the wanted gradients need.
struct BranchNeeds {
  bool hidden;      // values before the activation
  bool grad;        // gradient of those
  bool stage_grad;  // that gradient for all rows of a group, for the weight into the branch
  bool stage_value; // values after the activation for all rows of a group, for the weight out of the branch
};

// Rows of the blocks that stage together. Staging stays bounded for any batch; weight gradients add up over groups.
constexpr i64 kGroupRows = 1600;

// Memory of one group of row blocks, in floats.
struct FFNStage {
  i64 grad[2], value[2];  // [rows, width]
  i64 factor;             // [rows]: multiplies the adapter's branch
  i64 norm_sums;          // [blocks][2][dim]: shares of gamma's and beta's gradients
  i64 total;
};

struct FFNBackwardPlan {
  BranchNeeds needs[2];
  bool through_norm;  // the gradient of x or of LayerNorm is wanted
  FFNCut cut;
  i64 group_tasks;    // row blocks of a group
  FFNStage stage;
  i64 weights, scratch;  // floats
};

inline BranchNeeds branch_needs(const FFNBackwardCall& call, int branch, bool through_norm) {
  if (!call.problem.width[branch]) return {};
  const auto& wanted = call.gradients.branch[branch];
  BranchNeeds n;
  n.stage_grad = wanted.in_weight || wanted.in_bias;
  n.stage_value = wanted.out_weight;
  n.grad = through_norm || n.stage_grad;
  n.hidden = n.grad || n.stage_value;
  return n;
}

// At most three panels a branch: forward's into the branch, and both weights for the gradients of their inputs.
inline i64 ffn_backward_weights_size(const FFNProblem& p) {
  i64 floats = 0;
  for (int b = 0; b < 2; ++b) floats += 2 * packed_size(p.dim, p.width[b]) + packed_size(p.width[b], p.dim);
  return align16(floats);
}

inline FFNBackwardPlan plan_ffn_backward(const FFNBackwardCall& call) {
  const FFNProblem& p = call.problem;
  FFNBackwardPlan plan{};
  plan.through_norm = call.grad_x || call.gradients.norm_weight || call.gradients.norm_bias;
  plan.cut = ffn_cut(p);
  const i64 groups = ceil_div(plan.cut.tasks, max_of(1, kGroupRows / plan.cut.rows));
  plan.group_tasks = ceil_div(plan.cut.tasks, groups);
  const i64 rows = plan.group_tasks * plan.cut.rows;
  i64 at = 0;
  for (int b = 0; b < 2; ++b) {
    plan.needs[b] = branch_needs(call, b, plan.through_norm);
    plan.stage.grad[b] = take(at, plan.needs[b].stage_grad ? align16(rows * p.width[b]) : 0);
    plan.stage.value[b] = take(at, plan.needs[b].stage_value ? align16(rows * p.width[b]) : 0);
  }
  plan.stage.factor = take(at, align16(rows));
  plan.stage.norm_sums = take(at, align16(plan.group_tasks * 2 * p.dim));
  plan.stage.total = at + 64;
  plan.weights = ffn_backward_weights_size(p);
  const i64 rows_scratch = 3 * align16(plan.cut.rows * p.dim) + 2 * align16(plan.cut.rows * kHiddenChunk);
  plan.scratch = max_of(rows_scratch, weight_scratch_size()) + 64;
  return plan;
}

inline i64 ffn_backward_workspace(const FFNBackwardCall& call) {
  const FFNBackwardPlan plan = plan_ffn_backward(call);
  return plan.weights + plan.stage.total + plan.scratch * call.threads;
}

struct FFNBackwardWeights {
  Panels in[2];        // W_in^T, to compute hidden values again
  Panels out_grad[2];  // W_out: output's gradient -> hidden gradient
  Panels in_grad[2];   // W_in: hidden gradient -> normalised rows' gradient
};

inline FFNBackwardWeights pack_ffn_backward(const FFNBackwardCall& call, const FFNBackwardPlan& plan, float* at) {
  const FFNProblem& p = call.problem;
  FFNBackwardWeights w{};
  PackJobs jobs;
  const auto add = [&](const float* weight, i64 depth, i64 columns, bool transposed) {
    return add_next_pack_job(jobs, weight, at, depth, columns, transposed, kHasBf16 && p.bf16);
  };
  for (int b = 0; b < 2; ++b) {
    const auto& own = call.parameters.branch[b];
    if (plan.needs[b].hidden && !p.keep) w.in[b] = add(own.in_weight, p.dim, p.width[b], true);
    if (plan.needs[b].grad) w.out_grad[b] = add(own.out_weight, p.dim, p.width[b], false);
    if (plan.needs[b].grad && plan.through_norm) w.in_grad[b] = add(own.in_weight, p.width[b], p.dim, false);
  }
  run_pack_jobs(jobs, call.threads);
  return w;
}

CAST_ISA_END
