// Sizes, staging memory and packed weights of one backward call.
#pragma once

#include "attention_backward.h"
#include "forward_plan.h"
#include "weight_gradient.h"

CAST_ISA_BEGIN

// Gradients inside the block, per clip; rows in each stream's own order, CLS included.
struct StageLayout {
  i64 activation[2];    // [clip_rows, d]: of the value before GELU
  i64 attended[2];      // head-major like the queries: of attention's output
  i64 projected[2];     // [clip_rows, width]: of the stream's query, then key and value; zero for CLS
  i64 width[2];         // d if the stream asks, plus 2d if it answers
  i64 key_column[2];    // where the key part starts in the stream's `projected`
  i64 down[2];          // [clip_rows, d]: of the value before LayerNorm
  i64 norm_sums[2];     // [row blocks][2][d]: shares of gamma's and beta's gradients
  i64 total;
};

inline StageLayout stage_layout(const Problem& p) {
  StageLayout l{};
  i64 at = 0;
  const i64 d = p.bottleneck;
  for (int s = 0; s < 2; ++s) {
    const i64 rows = clip_rows(p, s);
    if (has_direction(p, s)) {
      l.activation[s] = take(at, rows * d);
      l.attended[s] = take(at, patch_tokens(p) * d);
    }
    l.key_column[s] = has_direction(p, s) ? d : 0;
    l.width[s] = l.key_column[s] + (has_direction(p, 1 - s) ? 2 * d : 0);
    l.projected[s] = take(at, rows * l.width[s]);
    l.down[s] = take(at, rows * d);
    l.norm_sums[s] = take(at, row_blocks_per_clip(p, s) * 2 * d);
  }
  l.total = at + align16(3 * 16 * d + 64);  // row tiles read past the last matrix
  return l;
}

struct BackwardPlan {
  Problem problem;
  ClipLayout kept, own;     // of a clip: in `saved`, and in the workspace (repeated values)
  StageLayout stage;
  ForwardPlan forward;      // of the repetitions
  WeightsWanted repeated;   // weights that the repetitions need
  i64 clips_in_flight;
  i64 weights, position_sums, scratch;  // floats
};

CAST_INLINE i64 padded_rows(i64 rows) { return round_up(rows, kTileRows); }

// Of one thread, the largest of: a tail copy, the LayerNorm block and tables for rows; attention's scratch; a weight
// block's.
CAST_INLINE i64 backward_scratch_size(const Problem& p) {
  i64 longest = 0;
  for (int a = 0; a < 2; ++a)
    if (has_direction(p, a)) longest = max_of(longest, window_length(p, a));
  const i64 rows = align16(kRowBlock * p.dim) + align16(kRowBlock * p.bottleneck) + align16(4 * kRowBlock);
  const i64 attention = 2 * align16(2 * longest) + align16(longest) + attention_backward_scratch_size(head_dim(p));
  const i64 sums = 4 * align16(p.bottleneck);
  return max_of(max_of(rows, attention), max_of(weight_scratch_size(), sums)) + 64;
}

CAST_INLINE WeightsWanted repeated_weights(Recompute recompute) {
  return {recompute == kAll, recompute != kNothing, recompute == kAll, false};
}

inline BackwardPlan plan_backward(const Problem& p, Recompute recompute, int threads) {
  const ClipLayout kept = kept_layout(p, recompute), own = backward_layout(p, recompute);
  BackwardPlan plan{p,  kept, own, stage_layout(p), plan_forward(p, kept, own, threads), repeated_weights(recompute), 0,
                    64, 0,    0};
  for (int s = 0; s < 2; ++s) {
    plan.weights += packed_size(plan.stage.width[s], p.bottleneck) + packed_size(p.bottleneck, p.dim);
    if (!has_direction(p, s)) continue;
    plan.weights += packed_size(p.dim, p.bottleneck) + packed_size(p.bottleneck, p.bottleneck);
    plan.position_sums += 3 * align16(padded_rows(window_length(p, s)) * p.bottleneck);
  }
  plan.clips_in_flight = plan.forward.clips_in_flight;
  plan.scratch = backward_scratch_size(p);
  if (recompute != kNothing) plan.scratch = max_of(plan.scratch, plan.forward.scratch);
  return plan;
}

// Offsets of the parts of backward's workspace.
struct BackwardRegions {
  i64 forward_weights, position_sums, clips, stages, scratch, total;
};
inline BackwardRegions backward_regions(const BackwardPlan& plan, int threads) {
  BackwardRegions r;
  r.forward_weights = plan.weights;
  r.position_sums = r.forward_weights + forward_weights_size(plan.problem, plan.repeated);
  r.clips = r.position_sums + plan.position_sums;
  r.stages = r.clips + plan.clips_in_flight * plan.own.total;
  // Aligned: the scratch holds 64-bit tables.
  r.scratch = align16(r.stages + plan.clips_in_flight * plan.stage.total);
  r.total = r.scratch + plan.scratch * threads;
  return r;
}

inline i64 backward_workspace(const Problem& p, Recompute recompute, int threads) {
  return backward_regions(plan_backward(p, recompute, threads), threads).total;
}

struct BackwardWeights {
  Panels up[2], proj[2], projected[2], down[2];
};

// `projected` stacks the query weight and the key-value weight that read one stream, so that one product gives the
// gradient of the stream's normalised bottleneck.
inline BackwardWeights pack_backward(const BackwardCall& call, const StageLayout& stage, float* at) {
  const Problem& p = call.problem;
  const i64 D = p.dim, d = p.bottleneck;
  const bool bf16 = uses_bf16(p);
  BackwardWeights w{};
  PackJobs jobs;
  const auto add = [&](const float* weight, i64 depth, i64 columns) {
    return add_next_pack_job(jobs, weight, at, depth, columns, false, bf16);
  };
  for (int s = 0; s < 2; ++s) {
    const auto& own = call.parameters.stream[s];
    w.down[s] = add(own.down_weight, d, D);
    const i64 stride = stage.width[s] * kTileColumns;
    if (has_direction(p, s)) {
      w.up[s] = add(own.up_weight, D, d);
      w.proj[s] = add(call.parameters.direction[s].proj_weight, d, d);
      add_pack_job(jobs, call.parameters.direction[s].q_weight, at, d, d, stride, false, bf16);
    }
    if (has_direction(p, 1 - s))
      add_pack_job(jobs, call.parameters.direction[1 - s].kv_weight, at + panel_row(stage.key_column[s], bf16), 2 * d,
                   d, stride, false, bf16);
    w.projected[s] = {at, stage.width[s], d, stride, bf16};
    at += packed_size(stage.width[s], d);
  }
  run_pack_jobs(jobs, call.threads);
  return w;
}

// A group of clips on its way through the phases.
struct BackwardRun {
  const BackwardCall& call;
  const BackwardPlan& plan;
  const BackwardWeights& weights;
  float *own, *stages;  // regions of the first clip in flight
  float* position_sums;
  i64 first_clip, clips;

  // backward only reads `saved`. The cast is for join(), which serves forward too, where `saved` is written.
  float* saved() const { return const_cast<float*>(call.saved) + first_clip * plan.kept.total; }
  Clip clip(i64 local) const {
    return join(plan.kept, saved() + local * plan.kept.total, plan.own, own + local * plan.own.total);
  }
  float* stage(i64 local) const { return stages + local * plan.stage.total; }
};

CAST_ISA_END
