// B-CAST forward: two phases per group of clips.
//
// Phase 1 turns blocks of rows of each stream into queries, keys and values: down, LayerNorm, + position, projections.
// Phase 2 takes blocks of queries through attention, output projection, GELU, up and residual.
#pragma once

#include "forward_plan.h"

CAST_ISA_BEGIN

// to[head-major slot of row] = input W^T + bias for the rows that have a slot.
inline void project(const ForwardRun& run, int direction, const float* input, i64 rows, const Panels& weight,
                    const float* bias, const i64* slots, float* to) {
  const HeadMajorRow heads = head_major_row(run.problem, direction);
  gemm(
      input, weight.depth, rows, weight, bias,
      [=](i64 row, i64 column, auto& v, i64 lanes) {
        if (slots[row] >= 0) heads.put(to + slots[row], column, v, lanes);
      },
      [=](i64 row, i64 column) {
        if (slots[row] >= 0) heads.prefetch(to + slots[row], column);
      });
}

// A projection's input rows: n, or n + the position table's row. Fills `slots` with each row's head-major offset, -1
// for CLS.
inline const float* with_position(const Problem& p, int direction, int stream, const float* table,
                                  const RowBlock& block, const float* n, i64* slots, float* sum) {
  const i64 d = p.bottleneck;
  for (i64 r = 0; r < block.rows; ++r) {
    const Token at = token_at(p, stream, block.first + r);
    if (at.n < 0) {
      slots[r] = -1;
      if (table) __builtin_memcpy(sum + r * d, n + r * d, sizeof(float) * size_t(d));
      continue;
    }
    const Slot slot = slot_of(p, direction, at.t, at.n);
    slots[r] = slot_offset(p, direction, slot);
    if (table) add_rows(n + r * d, table + slot.index * d, d, sum + r * d);
  }
  return table ? sum : n;
}

// s.a = LayerNorm(x Wd^T + bd), in the block's rows.
inline void normalise_rows(const ForwardRun& run, int stream, const RowBlock& block, const ForwardScratch& s) {
  const Problem& p = run.problem;
  const i64 D = p.dim, d = p.bottleneck;
  const auto& own = run.parameters.stream[stream];
  const i64 first_row = (run.first_clip + block.clip) * clip_rows(p, stream) + block.first;
  const Clip clip = run.clip(block.clip);

  const float* x = whole_tiles(run.input[stream] + first_row * D, block.rows, D, s.input);
  gemm(x, D, block.rows, run.weights.down[stream], own.down_bias,
       [=, to = s.a](i64 row, i64 column, auto& v, i64 lanes) { store_row(to + row * d + column, v, lanes); });
  float *normed = clip[kNormed][stream], *rstds = clip[kRstd][stream];
  for (i64 r = 0; r < block.rows; ++r) {
    const i64 row = block.first + r;
    float* n = s.a + r * d;
    const float rstd =
        normalise_row(n, d, own.norm_weight, own.norm_bias, p.eps, n, normed ? normed + row * d : nullptr);
    if (rstds) rstds[row] = rstd;
    const Token at = token_at(p, stream, row);
    if (at.n < 0 && has_direction(p, kSpatial)) __builtin_memcpy(cls_row(p, clip, at.t), n, sizeof(float) * size_t(d));
  }
}

// From s.a: queries of the direction in which the stream asks, keys and values of the direction in which it answers.
inline void project_rows(const ForwardRun& run, int stream, const RowBlock& block, const ForwardScratch& s) {
  const Problem& p = run.problem;
  const i64 d = p.bottleneck;
  const Clip clip = run.clip(block.clip);
  if (has_direction(p, stream)) {
    const auto& asks = run.parameters.direction[stream];
    const float* in = with_position(p, stream, stream, asks.q_pos, block, s.a, s.slot_table, s.b);
    project(run, stream, in, block.rows, run.weights.query[stream], asks.q_bias, s.slot_table, clip[kQuery][stream]);
  }
  const int other = 1 - stream;
  if (has_direction(p, other)) {
    const auto& answers = run.parameters.direction[other];
    const float* in = with_position(p, other, stream, answers.kv_pos, block, s.a, s.slot_table, s.b);
    project(run, other, in, block.rows, run.weights.key[other], answers.kv_bias, s.slot_table, clip[kKey][other]);
    project(run, other, in, block.rows, run.weights.value[other], answers.kv_bias + d, s.slot_table,
            clip[kValue][other]);
  }
}

inline void forward_rows(const ForwardRun& run, int stream, i64 task, const ForwardScratch& s) {
  const RowBlock block = row_block(run.problem, stream, task);
  normalise_rows(run, stream, block, s);
  project_rows(run, stream, block, s);
}

// output = input + scale * (hidden Wu^T + bu). Row r of `hidden` belongs to row row_table[r] of the stream.
inline void up_and_residual(const ForwardRun& run, int stream, const float* hidden, i64 rows, const i64* row_table,
                            const float* row_scale) {
  const i64 D = run.problem.dim, d = run.problem.bottleneck;
  const float* bias = run.parameters.stream[stream].up_bias;
  const float* x = run.input[stream];
  float* out = run.output[stream];
  gemm(
      hidden, d, rows, run.weights.up[stream], bias,
      [=](i64 row, i64 column, auto& v, i64 lanes) {
        const i64 at = row_table[row] * D + column;
        const float scale = row_scale[row];
        each(v, lanes,
             [=](i64 c, vec y, i64 n) { store_first(out + at + c, load_first(x + at + c, n) + y * scale, n); });
      },
      [=](i64 row, i64 column) {
        __builtin_prefetch(x + row_table[row] * D + column);
        prefetch_row(out + row_table[row] * D + column);
      });
}

// s.a = attention of the block's queries, all heads. row_max and inverse_sum receive the statistics unless they are
// null.
inline void attend_queries(const ForwardRun& run, int direction, const QueryBlock& block, const ForwardScratch& s,
                           float* row_max, float* inverse_sum) {
  const Problem& p = run.problem;
  const i64 d = p.bottleneck, hd = head_dim(p), window = window_length(p, direction);
  const Clip clip = run.clip(block.clip);
  const AttentionScratch scratch = attention_scratch(s.attention, hd);
  // exp(x) is computed as 2^(x log2 e), so log2 e joins the softmax scale.
  const float scale_log2 = 1.44269504088896f / __builtin_sqrtf(float(hd));
  for (i64 g = 0; g < block.groups; ++g)
    for (i64 h = 0; h < p.heads; ++h) {
      const i64 head = head_matrix(p, direction, block.first_group + g, h);
      const i64 statistic = head / hd + block.first_index;
      const HeadRows matrix{clip[kQuery][direction] + head + block.first_index * hd,
                            clip[kKey][direction] + head,
                            clip[kValue][direction] + head,
                            block.indices,
                            window,
                            hd};
      attend(matrix, scale_log2, scratch,
             {s.a + g * block.indices * d + h * hd, d, row_max ? row_max + statistic : nullptr,
              row_max ? inverse_sum + statistic : nullptr});
    }
}

CAST_INLINE i64 block_token(const Problem& p, int direction, const QueryBlock& block, i64 r) {
  return token_of(p, direction, block.first_group + r / block.indices, block.first_index + r % block.indices);
}

// attended[token] = the block's rows of s.a.
inline void keep_attended(const Problem& p, int direction, const QueryBlock& block, const float* rows,
                          float* attended) {
  const i64 d = p.bottleneck;
  for (i64 r = 0; r < block.groups * block.indices; ++r)
    __builtin_memcpy(attended + block_token(p, direction, block, r) * d, rows + r * d, sizeof(float) * size_t(d));
}

inline void forward_queries(const ForwardRun& run, int direction, i64 task, const ForwardScratch& s) {
  const Problem& p = run.problem;
  const i64 d = p.bottleneck;
  const QueryBlock block = query_block(p, direction, run.plan.cut[direction], task);
  const i64 rows = block.groups * block.indices, clip_index = run.first_clip + block.clip;
  const Clip clip = run.clip(block.clip);

  attend_queries(run, direction, block, s, clip[kRowMax][direction], clip[kInverseSum][direction]);
  if (float* attended = clip[kAttended][direction]) keep_attended(p, direction, block, s.a, attended);
  for (i64 r = 0; r < rows; ++r) {
    const i64 token = block_token(p, direction, block, r), row = row_of(p, direction, token);
    s.row_table[r] = clip_index * clip_rows(p, direction) + row;
    s.slot_table[r] = row * d;
    s.row_scale[r] = branch_scale(p, run.scale, direction, clip_index, token % p.patches);
  }
  gemm(s.a, d, rows, run.weights.proj[direction], run.parameters.direction[direction].proj_bias,
       [=, to = s.b, slots = s.slot_table, kept = clip[kActivation][direction]](i64 row, i64 column, auto& v,
                                                                                i64 lanes) {
         store_row(to + row * d + column, v, lanes);
         if (kept) store_row(kept + slots[row] + column, v, lanes);
       });
  if (!run.output) return;
  gelu_rows(s.b, rows * d);
  up_and_residual(run, direction, s.b, rows, s.row_table, s.row_scale);
}

// CLS rows of the clips in flight. Phase 1 normalised them; GELU, up and residual remain.
inline void forward_cls(const ForwardRun& run, i64 first, i64 rows, const ForwardScratch& s) {
  const Problem& p = run.problem;
  const i64 d = p.bottleneck;
  for (i64 r = 0; r < rows; ++r) {
    const i64 local = (first + r) / p.frames, t = (first + r) % p.frames, clip = run.first_clip + local;
    s.row_table[r] = clip * clip_rows(p, kSpatial) + t * frame_rows(p, kSpatial);
    s.row_scale[r] = branch_scale(p, run.scale, kSpatial, clip, -1);
    __builtin_memcpy(s.a + r * d, cls_row(p, run.clip(local), t), sizeof(float) * size_t(d));
  }
  gelu_rows(s.a, rows * d);
  up_and_residual(run, kSpatial, s.a, rows, s.row_table, s.row_scale);
}

// Both phases of the clips in flight. Without outputs it computes only the fields that backward needs. `scratch` has
// all threads' parts.
inline void forward_clips(const ForwardRun& run, i64 clips, int threads, float* scratch) {
  const Problem& p = run.problem;
  const ForwardPlan& plan = run.plan;
  const i64 all[2] = {clips * row_blocks_per_clip(p, 0), clips * row_blocks_per_clip(p, 1)};
  parallel_for(all[0] + all[1], threads, [&](i64 task, int thread) {
    const int stream = task < all[0] ? 0 : 1;
    forward_rows(run, stream, stream ? task - all[0] : task, forward_scratch(plan, scratch + thread * plan.scratch));
  });
  // The direction with the longer window first: its tasks are the longest.
  const i64 s2t = has_direction(p, 1) ? clips * plan.cut[1].tasks_per_clip : 0;
  const i64 t2s = has_direction(p, 0) ? clips * plan.cut[0].tasks_per_clip : 0;
  const i64 cls_rows = has_direction(p, 0) && run.output ? clips * p.frames : 0;
  parallel_for(s2t + t2s + ceil_div(cls_rows, kRowBlock), threads, [&](i64 task, int thread) {
    const ForwardScratch s = forward_scratch(plan, scratch + thread * plan.scratch);
    if (task < s2t) return forward_queries(run, 1, task, s);
    if (task < s2t + t2s) return forward_queries(run, 0, task - s2t, s);
    const i64 row = (task - s2t - t2s) * kRowBlock;
    forward_cls(run, row, min_of(kRowBlock, cls_rows - row), s);
  });
}

inline ForwardPlan forward_plan_of(const Problem& p, Recompute recompute, int threads) {
  return plan_forward(p, kept_layout(p, recompute), forward_layout(p, recompute), threads);
}

// `recompute` is kAll where nothing is kept.
inline i64 forward_workspace(const Problem& p, Recompute recompute, int threads) {
  const ForwardPlan plan = forward_plan_of(p, recompute, threads);
  return forward_weights_size(p, kForwardWeights) + clips_in_flight_floats(plan) + plan.scratch * threads;
}

inline void bcast_forward(const ForwardCall& call, float* workspace) {
  const Problem& p = call.problem;
  const ForwardPlan plan = forward_plan_of(p, call.recompute, call.threads);
  const ForwardWeights weights = pack_forward(p, call.parameters, kForwardWeights, workspace, call.threads);
  workspace += forward_weights_size(p, kForwardWeights);
  float* scratch = workspace + clips_in_flight_floats(plan);
  if (plan.kept.total)
    for (i64 clip = 1; clip <= p.batch; ++clip)
      __builtin_memset(call.saved + clip * plan.kept.total - read_slack(p), 0, sizeof(float) * size_t(read_slack(p)));
  for (i64 first = 0; first < p.batch; first += plan.clips_in_flight) {
    const ForwardRun run{p,           call.parameters,
                         call.input,  call.scale,
                         call.output, plan,
                         weights,     call.saved + first * plan.kept.total,
                         workspace,   first};
    forward_clips(run, min_of(plan.clips_in_flight, p.batch - first), call.threads, scratch);
  }
}

CAST_ISA_END
