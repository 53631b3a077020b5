// Sizes, packed weights and scratch memory of one forward call. Backward uses them to repeat parts of it.
#pragma once

#include "attention.h"
#include "clip.h"
#include "layernorm.h"
#include "pack.h"
#include "row_tables.h"
#include "threads.h"

CAST_ISA_BEGIN

struct ForwardPlan {
  Problem problem;
  ClipLayout kept, own;  // of a clip: in `saved`, and in the workspace
  QueryCut cut[2];
  i64 rows;              // most rows of any task, whole tiles
  i64 clips_in_flight;   // clips that share a phase
  i64 scratch;           // floats: one thread's buffers
};

// Tables (8 words a row), the input's tail copy, two [rows, d] buffers and the attention scratch.
CAST_INLINE i64 forward_scratch_size(const Problem& p, i64 rows) {
  const i64 tables = align16(8 * rows);
  return tables + align16(rows * p.dim) + 2 * align16(rows * p.bottleneck) + attention_scratch_size(head_dim(p)) + 64;
}

// Enough tasks to balance the threads. More clips would only push their regions out of the last-level cache.
CAST_INLINE i64 clips_in_flight(const Problem& p, int threads) {
  const i64 tasks = row_blocks_per_clip(p, 0) + row_blocks_per_clip(p, 1);
  return min_of(p.batch, max_of(1, ceil_div(8 * i64(threads), tasks)));
}

// Rounded up: 64-bit tables of the scratch follow, and an odd number of floats would misalign them.
CAST_INLINE i64 clips_in_flight_floats(const ForwardPlan& plan) {
  return align16(plan.clips_in_flight * plan.own.total);
}

inline ForwardPlan plan_forward(const Problem& p, const ClipLayout& kept, const ClipLayout& own, int threads) {
  ForwardPlan plan{p, kept, own, {}, kRowBlock, clips_in_flight(p, threads), 0};
  for (int a = 0; a < 2; ++a)
    if (has_direction(p, a)) {
      plan.cut[a] = query_cut(p, a);
      plan.rows = max_of(plan.rows, round_up(plan.cut[a].max_rows, kTileRows));
    }
  plan.scratch = forward_scratch_size(p, plan.rows);
  return plan;
}

struct ForwardWeights {
  Panels down[2], query[2], key[2], value[2], proj[2], up[2];
};

// Whether this level runs the problem's dense products in bfloat16. Weights stacked in one panel must begin at even
// depths.
CAST_INLINE bool uses_bf16(const Problem& p) { return kHasBf16 && p.bf16 && p.bottleneck % 2 == 0; }

// The weights to pack: forward's, or those of backward's repetitions.
struct WeightsWanted {
  bool down, projections, proj, up;
};
constexpr WeightsWanted kForwardWeights{true, true, true, true};

inline ForwardWeights pack_forward(const Problem& p, const Parameters& parameters, const WeightsWanted& wanted,
                                   float* at, int threads) {
  const i64 D = p.dim, d = p.bottleneck;
  ForwardWeights w{};
  PackJobs jobs;
  const auto add = [&](bool is_wanted, const float* weight, i64 depth, i64 columns) {
    return is_wanted ? add_next_pack_job(jobs, weight, at, depth, columns, true, uses_bf16(p)) : Panels{};
  };
  for (int s = 0; s < 2; ++s) {
    w.down[s] = add(wanted.down, parameters.stream[s].down_weight, D, d);
    if (!has_direction(p, s)) continue;
    const auto& a = parameters.direction[s];
    w.query[s] = add(wanted.projections, a.q_weight, d, d);
    w.key[s] = add(wanted.projections, a.kv_weight, d, d);
    w.value[s] = add(wanted.projections, a.kv_weight + d * d, d, d);
    w.proj[s] = add(wanted.proj, a.proj_weight, d, d);
    w.up[s] = add(wanted.up, parameters.stream[s].up_weight, d, D);
  }
  run_pack_jobs(jobs, threads);
  return w;
}

CAST_INLINE i64 forward_weights_size(const Problem& p, const WeightsWanted& wanted) {
  const i64 across = packed_size(p.dim, p.bottleneck), square = packed_size(p.bottleneck, p.bottleneck);
  i64 floats = 0;
  for (int s = 0; s < 2; ++s) {
    floats += wanted.down * across;
    if (has_direction(p, s))
      floats += (3 * wanted.projections + wanted.proj) * square + wanted.up * packed_size(p.bottleneck, p.dim);
  }
  return floats + 64;
}

// A group of clips on its way through the phases.
struct ForwardRun {
  const Problem& problem;
  const Parameters& parameters;
  const float* const* input;
  const float* const* scale;
  float* const* output;  // null: stop before the up-projection
  const ForwardPlan& plan;
  const ForwardWeights& weights;
  float *saved, *own;  // regions of the first clip in flight
  i64 first_clip;

  Clip clip(i64 local) const {
    return join(plan.kept, saved + local * plan.kept.total, plan.own, own + local * plan.own.total);
  }
};

// One thread's buffers.
struct ForwardScratch {
  i64 *row_table, *slot_table;
  float *input, *a, *b, *attention, *row_scale;
};
inline ForwardScratch forward_scratch(const ForwardPlan& plan, float* at) {
  ForwardScratch s;
  s.row_table = reinterpret_cast<i64*>(at);
  s.slot_table = s.row_table + plan.rows;
  s.row_scale = at + 4 * plan.rows;
  at += align16(8 * plan.rows);
  s.input = at;
  s.a = s.input + align16(plan.rows * plan.problem.dim);
  s.b = s.a + align16(plan.rows * plan.problem.bottleneck);
  s.attention = s.b + align16(plan.rows * plan.problem.bottleneck);
  return s;
}

CAST_ISA_END
