// B-CAST backward: forward's phases mirrored, then the sums over rows.
//
// 0 both:      values that forward did not keep, again
// 1 rows:      output gradient -> up -> GELU -> projection -> gradient of attention's output
// 2 attention: -> gradients of queries, keys, values
// 3 rows:      -> stream projections -> LayerNorm -> down -> input gradient
// 4 sums:      weights, biases, LayerNorm parameters, position tables (weight_sums.h)
#pragma once

#include "bcast_forward.h"
#include "weight_sums.h"

CAST_ISA_BEGIN

inline void backward_output(const BackwardRun& run, int stream, i64 task, float* scratch) {
  const Problem& p = run.call.problem;
  const i64 D = p.dim, d = p.bottleneck;
  const RowBlock block = row_block(p, stream, task);
  const float* before_gelu = run.clip(block.clip)[kActivation][stream] + block.first * d;
  float* stage = run.stage(block.clip);
  float* activation = stage + run.plan.stage.activation[stream] + block.first * d;
  float* attended = stage + run.plan.stage.attended[stream];

  float factor[kRowBlock];
  i64 slots[kRowBlock];
  for (i64 r = 0; r < block.rows; ++r) {
    const Token at = token_at(p, stream, block.first + r);
    factor[r] = branch_scale(p, run.call.scale, stream, run.first_clip + block.clip, at.n);
    slots[r] = at.n < 0 ? -1 : slot_offset(p, stream, slot_of(p, stream, at.t, at.n));
  }
  const i64 first_row = (run.first_clip + block.clip) * clip_rows(p, stream) + block.first;
  const float* grad = whole_tiles(run.call.grad_output[stream] + first_row * D, block.rows, D, scratch);
  const float* factors = factor;
  gemm(
      grad, D, block.rows, run.weights.up[stream], nullptr,
      [=](i64 row, i64 column, auto& v, i64 lanes) {
        const i64 at = row * d + column;
        const float scale = factors[row];
        each(v, lanes, [=](i64 c, vec y, i64 n) {
          store_first(activation + at + c, y * scale * gelu_slope(load_first(before_gelu + at + c, n)), n);
        });
      },
      [=](i64 row, i64 column) {
        __builtin_prefetch(before_gelu + row * d + column);
        prefetch_row(activation + row * d + column);
      });
  const HeadMajorRow heads = head_major_row(p, stream);
  const i64* slot = slots;
  gemm(
      activation, d, block.rows, run.weights.proj[stream], nullptr,
      [=](i64 row, i64 column, auto& v, i64 lanes) {
        if (slot[row] >= 0) heads.put(attended + slot[row], column, v, lanes);
      },
      [=](i64 row, i64 column) {
        if (slot[row] >= 0) heads.prefetch(attended + slot[row], column);
      });
}

struct AttentionTask {
  i64 clip, first_group, groups, first_head, heads;
};
// A short window's task: the groups of one query task, all heads. A long window's: one head of one group.
CAST_INLINE i64 attention_tasks_per_clip(const Problem& p, int direction) {
  if (window_length(p, direction) > kRowBlock) return window_groups(p, direction) * p.heads;
  return query_cut(p, direction).tasks_per_clip;
}
CAST_INLINE AttentionTask attention_task(const Problem& p, int direction, i64 task) {
  const i64 tasks = attention_tasks_per_clip(p, direction), clip = task / tasks, local = task % tasks;
  if (window_length(p, direction) > kRowBlock) return {clip, local / p.heads, 1, local % p.heads, 1};
  const QueryBlock block = query_block(p, direction, query_cut(p, direction), local);
  return {clip, block.first_group, block.groups, 0, p.heads};
}

inline void backward_attention(const BackwardRun& run, int direction, i64 index, float* scratch) {
  const Problem& p = run.call.problem;
  const i64 d = p.bottleneck, hd = head_dim(p), window = window_length(p, direction);
  const int other = 1 - direction;
  const StageLayout& stage_at = run.plan.stage;
  const AttentionTask task = attention_task(p, direction, index);
  const Clip clip = run.clip(task.clip);
  float* stage = run.stage(task.clip);
  i64* asking = reinterpret_cast<i64*>(scratch);
  i64* answering = reinterpret_cast<i64*>(scratch + align16(2 * window));
  float* delta = scratch + 2 * align16(2 * window);
  const AttentionBackwardScratch buffers = attention_backward_scratch(delta + align16(window), hd);

  const i64 token_stride = p.window[direction] == kTime ? p.patches : 1;

  for (i64 g = task.first_group; g < task.first_group + task.groups; ++g) {
    for (i64 i = 0; i < window; ++i) {
      const i64 token = token_of(p, direction, g, i);
      asking[i] = row_of(p, direction, token) * stage_at.width[direction];
      answering[i] = row_of(p, other, token) * stage_at.width[other];
    }
    for (i64 h = task.first_head; h < task.first_head + task.heads; ++h) {
      const i64 head = head_matrix(p, direction, g, h);
      const float* grad = stage + stage_at.attended[direction] + head;
      const float* attended = clip[kAttended][direction] + token_of(p, direction, g, 0) * d + h * hd;
      row_products(attended, token_stride * d, grad, window, hd, delta);
      float* answer = stage + stage_at.projected[other] + stage_at.key_column[other] + h * hd;
      attend_backward(
          {clip[kQuery][direction] + head, clip[kKey][direction] + head, clip[kValue][direction] + head, grad,
           clip[kRowMax][direction] + head / hd, clip[kInverseSum][direction] + head / hd, delta, window, hd,
           stage + stage_at.projected[direction] + h * hd, answer, answer + d, asking, answering},
          buffers);
    }
  }
}

inline void backward_input(const BackwardRun& run, int stream, i64 task, float* scratch) {
  const Problem& p = run.call.problem;
  const i64 D = p.dim, d = p.bottleneck, width = run.plan.stage.width[stream];
  const RowBlock block = row_block(p, stream, task);
  const Clip clip = run.clip(block.clip);
  const float *normed = clip[kNormed][stream], *rstd = clip[kRstd][stream];
  float* stage = run.stage(block.clip);
  float* projected = stage + run.plan.stage.projected[stream] + block.first * width;
  float* down = stage + run.plan.stage.down[stream] + block.first * d;
  float* sums = stage + run.plan.stage.norm_sums[stream] + block.first / kRowBlock * 2 * d;
  float* dn = scratch;

  const auto is_cls = [&](i64 r) { return token_at(p, stream, block.first + r).n < 0; };
  for (i64 r = 0; r < block.rows; ++r)
    if (is_cls(r)) __builtin_memset(projected + r * width, 0, sizeof(float) * size_t(width));
  gemm(projected, width, block.rows, run.weights.projected[stream], nullptr,
       [=](i64 row, i64 column, auto& v, i64 lanes) { store_row(dn + row * d + column, v, lanes); });
  __builtin_memset(sums, 0, sizeof(float) * size_t(2 * d));
  for (i64 r = 0; r < block.rows; ++r) {
    const i64 row = block.first + r;
    // CLS reaches GELU without attention: the gradient of its normalised value is that of the value before GELU.
    const bool from_output = has_direction(p, stream) && is_cls(r);
    const float* grad = from_output ? stage + run.plan.stage.activation[stream] + row * d : dn + r * d;
    normalise_row_backward(grad, normed + row * d, rstd[row], d, run.call.parameters.stream[stream].norm_weight,
                           down + r * d, sums, sums + d);
  }
  if (!run.call.grad_input[stream]) return;
  const i64 first_row = (run.first_clip + block.clip) * clip_rows(p, stream) + block.first;
  const float* residual = has_direction(p, stream) ? run.call.grad_output[stream] + first_row * D : nullptr;
  float* grad_input = run.call.grad_input[stream] + first_row * D;
  gemm(
      down, d, block.rows, run.weights.down[stream], nullptr,
      [=](i64 row, i64 column, auto& v, i64 lanes) {
        const i64 at = row * D + column;
        if (!residual) return store_row(grad_input + at, v, lanes);
        each(v, lanes,
             [=](i64 c, vec y, i64 n) { store_first(grad_input + at + c, y + load_first(residual + at + c, n), n); });
      },
      [=](i64 row, i64 column) {
        if (residual) __builtin_prefetch(residual + row * D + column);
        prefetch_row(grad_input + row * D + column);
      });
}

// s.a = the block's normalised rows, with the bits of forward's normalise_rows.
inline void restore_rows(const ForwardRun& run, int stream, const RowBlock& block, const ForwardScratch& s) {
  const i64 d = run.problem.bottleneck;
  const auto& own = run.parameters.stream[stream];
  const float* normed = run.clip(block.clip)[kNormed][stream] + block.first * d;
  for (i64 r = 0; r < block.rows; ++r)
    scale_and_shift_row(normed + r * d, d, own.norm_weight, own.norm_bias, s.a + r * d);
}

inline void repeat_attended(const ForwardRun& run, int direction, i64 task, const ForwardScratch& s) {
  const QueryBlock block = query_block(run.problem, direction, run.plan.cut[direction], task);
  attend_queries(run, direction, block, s, nullptr, nullptr);
  keep_attended(run.problem, direction, block, s.a, run.clip(block.clip)[kAttended][direction]);
}

// Phase 0 if forward kept the normalised rows and activations: projections and attention.
inline void repeat_cheap(const ForwardRun& run, i64 clips, int threads, float* scratch) {
  const Problem& p = run.problem;
  const ForwardPlan& plan = run.plan;
  const auto own = [&](int thread) { return forward_scratch(plan, scratch + thread * plan.scratch); };
  const i64 first = clips * row_blocks_per_clip(p, 0);
  parallel_for(first + clips * row_blocks_per_clip(p, 1), threads, [&](i64 task, int thread) {
    const int stream = task < first ? 0 : 1;
    const RowBlock block = row_block(p, stream, stream ? task - first : task);
    restore_rows(run, stream, block, own(thread));
    project_rows(run, stream, block, own(thread));
  });
  const i64 s2t = has_direction(p, 1) ? clips * plan.cut[1].tasks_per_clip : 0;
  const i64 t2s = has_direction(p, 0) ? clips * plan.cut[0].tasks_per_clip : 0;
  parallel_for(s2t + t2s, threads, [&](i64 task, int thread) {
    repeat_attended(run, task < s2t ? 1 : 0, task < s2t ? task : task - s2t, own(thread));
  });
}

// Phase 0: computes the fields that forward did not keep of the clips in flight, with the same bits.
inline void repeat_forward(const BackwardRun& run, const ForwardWeights& weights, float* scratch) {
  const BackwardCall& call = run.call;
  if (call.recompute == kNothing) return;
  ForwardPlan plan = run.plan.forward;
  plan.scratch = run.plan.scratch;
  const ForwardRun forward{call.problem, call.parameters, call.input,  call.scale, nullptr,
                           plan,         weights,         run.saved(), run.own,    run.first_clip};
  if (call.recompute == kAll)
    forward_clips(forward, run.clips, call.threads, scratch);
  else
    repeat_cheap(forward, run.clips, call.threads, scratch);
}

inline void bcast_backward(const BackwardCall& call, float* workspace) {
  const Problem& p = call.problem;
  const BackwardPlan plan = plan_backward(p, call.recompute, call.threads);
  const BackwardRegions at = backward_regions(plan, call.threads);
  const BackwardWeights weights = pack_backward(call, plan.stage, workspace);
  const ForwardWeights forward_weights =
      pack_forward(p, call.parameters, plan.repeated, workspace + at.forward_weights, call.threads);
  float* position_sums = workspace + at.position_sums;
  float* scratch = workspace + at.scratch;
  const auto both = [&](i64 first_count, i64 second_count, const auto& body) {
    parallel_for(first_count + second_count, call.threads, [&](i64 task, int thread) {
      const int which = task < first_count ? 0 : 1;
      body(which, which ? task - first_count : task, scratch + thread * plan.scratch);
    });
  };
  const i64 blocks[2] = {row_blocks_per_clip(p, 0), row_blocks_per_clip(p, 1)};
  const bool has[2] = {has_direction(p, 0), has_direction(p, 1)};

  for (i64 first = 0; first < p.batch; first += plan.clips_in_flight) {
    const i64 clips = min_of(plan.clips_in_flight, p.batch - first);
    const BackwardRun run{call,          plan,  weights, workspace + at.clips, workspace + at.stages,
                          position_sums, first, clips};
    repeat_forward(run, forward_weights, scratch);
    both(has[0] ? clips * blocks[0] : 0, has[1] ? clips * blocks[1] : 0,
         [&](int stream, i64 task, float* own) { backward_output(run, stream, task, own); });
    // s2t first: with the published windows its tasks are the longer ones.
    both(has[1] ? clips * attention_tasks_per_clip(p, 1) : 0, has[0] ? clips * attention_tasks_per_clip(p, 0) : 0,
         [&](int which, i64 task, float* own) { backward_attention(run, 1 - which, task, own); });
    both(clips * blocks[0], clips * blocks[1],
         [&](int stream, i64 task, float* own) { backward_input(run, stream, task, own); });
    const SumTasks sums = list_sums(run);
    parallel_for(sums.tasks(), call.threads,
                 [&](i64 task, int thread) { run_sum(run, sums, task, scratch + thread * plan.scratch); });
  }
  finish_positions(call, plan, weights, position_sums);
}

CAST_ISA_END
