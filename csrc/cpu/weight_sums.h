// Phase 4 of backward: all sums over rows. Each task owns its part of the result.
#pragma once

#include "backward_plan.h"

CAST_ISA_BEGIN

enum SumKind : int { kSumUp, kSumDown, kSumQuery, kSumKeyValue, kSumProj, kSumPositions, kSumNorm };

struct SumJob {
  static constexpr const char* kList = "SumTasks";
  SumKind kind;
  int index;      // stream for up, down, norm; direction for the others
  i64 outs, ins;  // shape of the weight
  float *weight, *bias;
};

using SumTasks = JobList<SumJob, 16>;

constexpr i64 kPositionBlock = 8;  // one task owns the sums of so many positions

inline void add_sum(SumTasks& list, SumKind kind, int index, i64 outs, i64 ins, float* weight, float* bias) {
  if (!weight && !bias) return;
  const i64 tasks = kind == kSumPositions ? ceil_div(outs, kPositionBlock)
                    : kind == kSumNorm    ? 1
                                          : weight_blocks(outs, ins);
  list.add({kind, index, outs, ins, weight, bias}, tasks);
}

inline SumTasks list_sums(const BackwardRun& run) {
  const Problem& p = run.call.problem;
  const i64 D = p.dim, d = p.bottleneck;
  SumTasks list;
  for (int s = 0; s < 2; ++s) {
    const auto& own = run.call.gradients.stream[s];
    const auto& asks = run.call.gradients.direction[s];
    add_sum(list, kSumDown, s, d, D, own.down_weight, own.down_bias);
    if (has_direction(p, s)) {
      add_sum(list, kSumUp, s, D, d, own.up_weight, own.up_bias);
      add_sum(list, kSumQuery, s, d, d, asks.q_weight, asks.q_bias);
      add_sum(list, kSumKeyValue, s, 2 * d, d, asks.kv_weight, asks.kv_bias);
      add_sum(list, kSumProj, s, d, d, asks.proj_weight, asks.proj_bias);
      add_sum(list, kSumPositions, s, window_length(p, s), d, asks.q_pos, asks.kv_pos);
    }
    add_sum(list, kSumNorm, s, 1, d, own.norm_weight, own.norm_bias);
  }
  return list;
}

// A layer's output gradients, row by row of the stream that the layer reads.
struct LeftRows {
  const float* data;
  i64 stride;
  int stream;
  bool skip_cls;
};

inline LeftRows left_rows(const BackwardRun& run, const SumJob& job, i64 clip) {
  const Problem& p = run.call.problem;
  const StageLayout& at = run.plan.stage;
  const float* stage = run.stage(clip);
  const int other = 1 - job.index;
  switch (job.kind) {
    case kSumUp:
      return {run.call.grad_output[job.index] + (run.first_clip + clip) * clip_rows(p, job.index) * p.dim, p.dim,
              job.index, false};
    case kSumDown:
      return {stage + at.down[job.index], p.bottleneck, job.index, false};
    case kSumQuery:
      return {stage + at.projected[job.index], at.width[job.index], job.index, true};
    case kSumKeyValue:
      return {stage + at.projected[other] + at.key_column[other], at.width[other], other, true};
    default:
      return {stage + at.activation[job.index], p.bottleneck, job.index, true};
  }
}

// Offsets of rows first .. first + count of a clip: in the layer's output gradient, its input and its position table.
inline void list_rows(const BackwardRun& run, const SumJob& job, const LeftRows& left, i64 clip, i64 first, i64 count,
                      i64 first_out, ChunkRows& rows) {
  const Problem& p = run.call.problem;
  const i64 width = job.ins;
  const bool has_table = job.kind == kSumQuery || job.kind == kSumKeyValue;
  rows.count = count;
  for (i64 r = 0; r < count; ++r) {
    const i64 row = first + r;
    const Token at = token_at(p, left.stream, row);
    const bool cls = at.n < 0;
    rows.left[r] = cls && left.skip_cls ? nullptr : left.data + row * left.stride + first_out;
    rows.factor[r] =
        job.kind == kSumUp ? branch_scale(p, run.call.scale, left.stream, run.first_clip + clip, at.n) : 1.0f;
    rows.right[r] = job.kind != kSumProj ? row * width : cls ? -1 : (at.t * p.patches + at.n) * width;
    rows.position[r] = has_table && !cls ? slot_of(p, job.index, at.t, at.n).index * width : -1;
  }
}

// Passes one chunk of the layer's input to add_chunk, in the form that the layer reads.
inline void add_layer_chunk(const BackwardRun& run, const SumJob& job, i64 clip, const ChunkRows& rows,
                            const WeightBlock& block, bool add, const WeightScratch& s) {
  const Problem& p = run.call.problem;
  const Clip fields = run.clip(clip);
  const auto finish = [&](const auto& value_at) {
    add_chunk(s, rows.count, block, job.ins, job.weight, add, value_at);
  };
  if (job.kind == kSumDown) {
    const float* x = run.call.input[job.index] + (run.first_clip + clip) * clip_rows(p, job.index) * p.dim;
    return finish([&](i64 r, i64 c, i64 lanes) { return load_first(x + rows.right[r] + c, lanes); });
  }
  if (job.kind == kSumUp) {
    const float* x = fields[kActivation][job.index];
    return finish([&](i64 r, i64 c, i64 lanes) { return gelu(load_first(x + rows.right[r] + c, lanes)); });
  }
  if (job.kind == kSumProj) {
    const float* x = fields[kAttended][job.index];
    return finish(
        [&](i64 r, i64 c, i64 lanes) { return rows.right[r] < 0 ? vec{} : load_first(x + rows.right[r] + c, lanes); });
  }
  const int stream = job.kind == kSumQuery ? job.index : 1 - job.index;
  const auto& direction = run.call.parameters.direction[job.index];
  const float* table = job.kind == kSumQuery ? direction.q_pos : direction.kv_pos;
  const float* gamma = run.call.parameters.stream[stream].norm_weight;
  const float* beta = run.call.parameters.stream[stream].norm_bias;
  const float* x = fields[kNormed][stream];
  finish([&](i64 r, i64 c, i64 lanes) {
    const vec n = load_first(x + rows.right[r] + c, lanes) * load_first(gamma + c, lanes) + load_first(beta + c, lanes);
    return table && rows.position[r] >= 0 ? n + load_first(table + rows.position[r] + c, lanes) : n;
  });
}

inline void sum_layer(const BackwardRun& run, const SumJob& job, i64 task, const WeightScratch& s) {
  const Problem& p = run.call.problem;
  const WeightBlock block = weight_block(job.outs, job.ins, task);
  const bool sum_bias = job.bias && block.in == 0;
  if (!job.weight && !sum_bias) return;
  bool add = run.first_clip > 0;
  for (i64 clip = 0; clip < run.clips; ++clip) {
    const LeftRows left = left_rows(run, job, clip);
    const i64 all = clip_rows(p, left.stream), chunk = ceil_div(all, ceil_div(all, kChunk));
    for (i64 first = 0; first < all; first += chunk) {
      ChunkRows rows;
      list_rows(run, job, left, clip, first, min_of(chunk, all - first), block.out, rows);
      take_left(s, rows, block.outs, job.weight != nullptr, sum_bias);
      if (sum_bias) {
        if (!add) __builtin_memset(job.bias + block.out, 0, sizeof(float) * size_t(block.outs));
        add_into(job.bias + block.out, s.chunk, block.outs);
      }
      if (job.weight) add_layer_chunk(run, job, clip, rows, block, add, s);
      add = true;
    }
  }
}

struct PositionSums {
  float *query, *key_value;  // [window, d] and [window, 2d], rows padded to whole tiles
};
inline PositionSums position_sums(const Problem& p, float* at, int direction) {
  if (direction == 1 && has_direction(p, 0)) at += 3 * align16(padded_rows(window_length(p, 0)) * p.bottleneck);
  return {at, at + align16(padded_rows(window_length(p, direction)) * p.bottleneck)};
}

// total (+)= the rows of position `index` in every window, `count` columns from `column`; `chain` is scratch.
inline void sum_position(const BackwardRun& run, int direction, int stream, i64 index, i64 column, i64 count,
                         float* chain, float* total) {
  const Problem& p = run.call.problem;
  const i64 width = run.plan.stage.width[stream], groups = window_groups(p, direction);
  if (run.first_clip == 0) __builtin_memset(total, 0, sizeof(float) * size_t(count));
  for (i64 clip = 0; clip < run.clips; ++clip) {
    const float* data = run.stage(clip) + run.plan.stage.projected[stream] + column;
    for (i64 g = 0; g < groups; ++g) {
      const float* row = data + row_of(p, stream, token_of(p, direction, g, index)) * width;
      if (g % kSumChain == 0)
        __builtin_memcpy(chain, row, sizeof(float) * size_t(count));
      else
        add_into(chain, row, count);
      if (g % kSumChain == kSumChain - 1 || g == groups - 1) add_into(total, chain, count);
    }
  }
}

inline void sum_positions(const BackwardRun& run, const SumJob& job, i64 task, float* scratch) {
  const Problem& p = run.call.problem;
  const i64 d = p.bottleneck;
  const int asking = job.index, answering = 1 - asking;
  const PositionSums sums = position_sums(p, run.position_sums, asking);
  const i64 first = task * kPositionBlock;
  for (i64 i = first; i < min_of(first + kPositionBlock, job.outs); ++i) {
    if (job.weight) sum_position(run, asking, asking, i, 0, d, scratch, sums.query + i * d);
    if (job.bias)
      sum_position(run, asking, answering, i, run.plan.stage.key_column[answering], 2 * d, scratch,
                   sums.key_value + i * 2 * d);
  }
}

inline void sum_norm(const BackwardRun& run, const SumJob& job) {
  const Problem& p = run.call.problem;
  const i64 d = p.bottleneck, blocks = row_blocks_per_clip(p, job.index);
  float* const results[2] = {job.weight, job.bias};
  for (int which = 0; which < 2; ++which) {
    if (!results[which]) continue;
    if (run.first_clip == 0) __builtin_memset(results[which], 0, sizeof(float) * size_t(d));
    for (i64 clip = 0; clip < run.clips; ++clip)
      for (i64 b = 0; b < blocks; ++b)
        add_into(results[which], run.stage(clip) + run.plan.stage.norm_sums[job.index] + (2 * b + which) * d, d);
  }
}

inline void run_sum(const BackwardRun& run, const SumTasks& list, i64 task, float* scratch) {
  list.run(task, [&](const SumJob& job, i64 own_task) {
    if (job.kind == kSumNorm) return sum_norm(run, job);
    if (job.kind == kSumPositions) return sum_positions(run, job, own_task, scratch);
    sum_layer(run, job, own_task, weight_scratch(scratch, uses_bf16(run.call.problem)));
  });
}

// A position's gradient = (its query, or key and value, gradients summed over windows) times the projection's weight.
// Sum and product commute, so one small product per call replaces one per window.
inline void finish_positions(const BackwardCall& call, const BackwardPlan& plan, const BackwardWeights& weights,
                             float* sums_at) {
  const Problem& p = call.problem;
  const i64 d = p.bottleneck;
  for (int a = 0; a < 2; ++a) {
    if (!has_direction(p, a)) continue;
    const auto& wanted = call.gradients.direction[a];
    const PositionSums sums = position_sums(p, sums_at, a);
    const Panels &asks = weights.projected[a], &answers = weights.projected[1 - a];
    const Panels query = depth_slice(asks, 0, d);
    const Panels key_value = depth_slice(answers, plan.stage.key_column[1 - a], 2 * d);
    const auto product = [&](const float* rows_at, const Panels& weight, float* result) {
      if (!result) return;
      const i64 rows = window_length(p, a);
      parallel_for(ceil_div(rows, kRowBlock), call.threads, [&](i64 task, int) {
        const i64 first = task * kRowBlock;
        gemm(
            rows_at + first * weight.depth, weight.depth, min_of(kRowBlock, rows - first), weight, nullptr,
            [=](i64 row, i64 column, auto& v, i64 lanes) { store_row(result + (first + row) * d + column, v, lanes); });
      });
    };
    product(sums.query, query, wanted.q_pos);
    product(sums.key_value, key_value, wanted.kv_pos);
  }
}

CAST_ISA_END
