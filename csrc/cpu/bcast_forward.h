// B-CAST forward: two phases per group of clips.
//
// Phase 1 turns blocks of rows of each stream into queries, keys and values: down, LayerNorm, + position, projections.
// Phase 2 takes blocks of queries through attention, output projection, GELU, up and residual.
#pragma once

#include "attention.h"
#include "layernorm.h"
#include "pack.h"
#include "row_tables.h"
#include "threads.h"

CAST_ISA_BEGIN

struct ForwardPlan {
  Problem problem;
  ClipLayout layout;
  bool save;
  QueryCut cut[2];
  i64 rows;              // most rows of any task, whole tiles
  i64 clips_in_flight;   // clips that share a phase
  i64 weights, scratch;  // floats: packed weights, one thread's buffers
  i64 state;             // floats: clip regions, none when they lie in `saved`
};

CAST_INLINE i64 forward_weights_size(const Problem& p) {
  i64 floats = 0;
  for (int s = 0; s < 2; ++s) {
    floats += packed_size(p.dim, p.bottleneck);
    if (has_direction(p, s)) floats += 4 * packed_size(p.bottleneck, p.bottleneck) + packed_size(p.bottleneck, p.dim);
  }
  return floats + 64;
}

// Tables (8 words a row), the input's tail copy, two [rows, d] buffers and the attention scratch.
CAST_INLINE i64 forward_scratch_size(const Problem& p, i64 rows) {
  const i64 tables = align16(8 * rows);
  return tables + align16(rows * p.dim) + 2 * align16(rows * p.bottleneck) + attention_scratch_size(head_dim(p)) + 64;
}

inline ForwardPlan plan_forward(const Problem& p, bool save, int threads) {
  ForwardPlan plan{p, save ? saved_layout(p) : scratch_layout(p), save, {}, kRowBlock, 1, 0, 0, 0};
  i64 tasks = row_blocks_per_clip(p, 0) + row_blocks_per_clip(p, 1);
  for (int a = 0; a < 2; ++a)
    if (has_direction(p, a)) {
      plan.cut[a] = query_cut(p, a);
      plan.rows = max_of(plan.rows, round_up(plan.cut[a].max_rows, kTileRows));
    }
  // Enough tasks to balance the threads; more clips would only push the state out of the last-level cache.
  plan.clips_in_flight = min_of(p.batch, max_of(1, ceil_div(8 * i64(threads), tasks)));
  plan.weights = forward_weights_size(p);
  plan.scratch = forward_scratch_size(p, plan.rows);
  plan.state = save ? 0 : plan.clips_in_flight * plan.layout.total;
  return plan;
}

inline i64 forward_workspace(const Problem& p, bool save, int threads) {
  const ForwardPlan plan = plan_forward(p, save, threads);
  return plan.weights + plan.state + plan.scratch * threads;
}

struct ForwardWeights {
  Panels down[2], query[2], key[2], value[2], proj[2], up[2];
};

inline ForwardWeights pack_forward(const ForwardCall& call, float* at) {
  const Problem& p = call.problem;
  const i64 D = p.dim, d = p.bottleneck;
  ForwardWeights w{};
  PackJobs jobs{};
  const auto add = [&](const float* weight, i64 depth, i64 columns) {
    const Panels packed = add_pack_job(jobs, weight, at, depth, columns, depth * kTileColumns, true);
    at += packed_size(depth, columns);
    return packed;
  };
  for (int s = 0; s < 2; ++s) {
    w.down[s] = add(call.parameters.stream[s].down_weight, D, d);
    if (!has_direction(p, s)) continue;
    const auto& a = call.parameters.direction[s];
    w.query[s] = add(a.q_weight, d, d);
    w.key[s] = add(a.kv_weight, d, d);
    w.value[s] = add(a.kv_weight + d * d, d, d);
    w.proj[s] = add(a.proj_weight, d, d);
    w.up[s] = add(call.parameters.stream[s].up_weight, d, D);
  }
  parallel_for(jobs.tasks, call.threads, [&](i64 task, int) { run_pack_job(jobs, task); });
  return w;
}

struct ForwardRun {
  const ForwardCall& call;
  const ForwardPlan& plan;
  const ForwardWeights& weights;
  float* state;       // region of the first clip in flight
  i64 first_clip;
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

// to[head-major slot of row] = input W^T + bias for the rows that have a slot.
inline void project(const ForwardRun& run, int direction, const float* input, i64 rows, const Panels& weight,
                    const float* bias, const i64* slots, float* to) {
  const HeadMajorRow heads = head_major_row(run.call.problem, direction);
  gemm(
      input, weight.depth, rows, weight, bias,
      [=](i64 row, i64 column, auto& v, i64 lanes) {
        if (slots[row] >= 0) heads.put(to + slots[row], column, v, lanes);
      },
      [=](i64 row, i64 column) {
        if (slots[row] >= 0) heads.prefetch(to + slots[row], column);
      });
}

// input rows for a projection: n, or n + the position table's row.
inline const float* with_position(const Problem& p, int direction, int stream, const float* table, const RowBlock& block,
                                  const float* n, i64* slots, float* sum) {
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

inline void forward_rows(const ForwardRun& run, int stream, i64 task, const ForwardScratch& s) {
  const Problem& p = run.call.problem;
  const ClipLayout& layout = run.plan.layout;
  const i64 D = p.dim, d = p.bottleneck;
  const RowBlock block = row_block(p, stream, task);
  const auto& own = run.call.parameters.stream[stream];
  const i64 first_row = (run.first_clip + block.clip) * clip_rows(p, stream) + block.first;
  float* region = run.state + block.clip * layout.total;

  const float* x = whole_tiles(run.call.input[stream] + first_row * D, block.rows, D, s.input);
  gemm(x, D, block.rows, run.weights.down[stream], own.down_bias,
       [=, to = s.a](i64 row, i64 column, auto& v, i64 lanes) { store_row(to + row * d + column, v, lanes); });
  for (i64 r = 0; r < block.rows; ++r) {
    const i64 row = block.first + r;
    float* normed = run.plan.save ? region + layout.normed[stream] + row * d : nullptr;
    const float rstd = normalise_row(s.a + r * d, d, own.norm_weight, own.norm_bias, p.eps, s.a + r * d, normed);
    if (run.plan.save) region[layout.rstd[stream] + row] = rstd;
    const Token at = token_at(p, stream, row);
    if (at.n < 0 && has_direction(p, kSpatial))
      __builtin_memcpy(region + layout.cls + at.t * layout.cls_stride, s.a + r * d, sizeof(float) * size_t(d));
  }
  if (has_direction(p, stream)) {
    const auto& asks = run.call.parameters.direction[stream];
    const float* in = with_position(p, stream, stream, asks.q_pos, block, s.a, s.slot_table, s.b);
    project(run, stream, in, block.rows, run.weights.query[stream], asks.q_bias, s.slot_table,
            region + layout.query[stream]);
  }
  const int other = 1 - stream;
  if (has_direction(p, other)) {
    const auto& answers = run.call.parameters.direction[other];
    const float* in = with_position(p, other, stream, answers.kv_pos, block, s.a, s.slot_table, s.b);
    project(run, other, in, block.rows, run.weights.key[other], answers.kv_bias, s.slot_table,
            region + layout.key[other]);
    project(run, other, in, block.rows, run.weights.value[other], answers.kv_bias + d, s.slot_table,
            region + layout.value[other]);
  }
}

// output = input + scale * (hidden Wu^T + bu) for rows whose positions in the stream are in the row table.
inline void up_and_residual(const ForwardRun& run, int stream, const float* hidden, i64 rows, const i64* row_table,
                            const float* row_scale) {
  const i64 D = run.call.problem.dim, d = run.call.problem.bottleneck;
  const float* bias = run.call.parameters.stream[stream].up_bias;
  const float* x = run.call.input[stream];
  float* out = run.call.output[stream];
  gemm(
      hidden, d, rows, run.weights.up[stream], bias,
      [=](i64 row, i64 column, auto& v, i64 lanes) {
        const i64 at = row_table[row] * D + column;
        const float scale = row_scale[row];
        each(v, lanes, [=](i64 c, vec y, i64 n) { store_first(out + at + c, load_first(x + at + c, n) + y * scale, n); });
      },
      [=](i64 row, i64 column) {
        __builtin_prefetch(x + row_table[row] * D + column);
        prefetch_row(out + row_table[row] * D + column);
      });
}

inline void forward_queries(const ForwardRun& run, int direction, i64 task, const ForwardScratch& s) {
  const Problem& p = run.call.problem;
  const ClipLayout& layout = run.plan.layout;
  const i64 d = p.bottleneck, hd = head_dim(p), window = window_length(p, direction);
  const QueryBlock block = query_block(p, direction, run.plan.cut[direction], task);
  const i64 rows = block.groups * block.indices, clip = run.first_clip + block.clip;
  float* region = run.state + block.clip * layout.total;
  const AttentionScratch scratch = attention_scratch(s.attention, hd);
  // exp(x) is computed as 2^(x log2 e), so log2 e joins the softmax scale.
  const float scale_log2 = 1.44269504088896f / __builtin_sqrtf(float(hd));

  for (i64 g = 0; g < block.groups; ++g)
    for (i64 h = 0; h < p.heads; ++h) {
      const i64 head = head_matrix(p, direction, block.first_group + g, h);
      const i64 statistic = head / hd + block.first_index;
      const HeadRows matrix{region + layout.query[direction] + head + block.first_index * hd,
                            region + layout.key[direction] + head, region + layout.value[direction] + head,
                            block.indices, window, hd};
      attend(matrix, scale_log2, scratch,
             {s.a + g * block.indices * d + h * hd, d,
              run.plan.save ? region + layout.row_max[direction] + statistic : nullptr,
              run.plan.save ? region + layout.inverse_sum[direction] + statistic : nullptr});
    }
  for (i64 r = 0; r < rows; ++r) {
    const i64 token = token_of(p, direction, block.first_group + r / block.indices,
                               block.first_index + r % block.indices);
    const i64 row = row_of(p, direction, token);
    s.row_table[r] = clip * clip_rows(p, direction) + row;
    s.slot_table[r] = layout.activation[direction] + row * d;
    s.row_scale[r] = branch_scale(p, run.call.scale, direction, clip, token % p.patches);
    if (run.plan.save)
      __builtin_memcpy(region + layout.attended[direction] + token * d, s.a + r * d, sizeof(float) * size_t(d));
  }
  const float* bias = run.call.parameters.direction[direction].proj_bias;
  float* kept = run.plan.save ? region : nullptr;
  gemm(s.a, d, rows, run.weights.proj[direction], bias,
       [=, to = s.b, slots = s.slot_table](i64 row, i64 column, auto& v, i64 lanes) {
         store_row(to + row * d + column, v, lanes);
         if (kept) store_row(kept + slots[row] + column, v, lanes);
       });
  gelu_rows(s.b, rows * d);
  up_and_residual(run, direction, s.b, rows, s.row_table, s.row_scale);
}

// CLS rows of the clips in flight: already normalised by phase 1; GELU, up, residual remain.
inline void forward_cls(const ForwardRun& run, i64 first, i64 rows, const ForwardScratch& s) {
  const Problem& p = run.call.problem;
  const ClipLayout& layout = run.plan.layout;
  const i64 d = p.bottleneck;
  for (i64 r = 0; r < rows; ++r) {
    const i64 local = (first + r) / p.frames, t = (first + r) % p.frames, clip = run.first_clip + local;
    s.row_table[r] = clip * clip_rows(p, kSpatial) + t * frame_rows(p, kSpatial);
    s.row_scale[r] = branch_scale(p, run.call.scale, kSpatial, clip, -1);
    __builtin_memcpy(s.a + r * d, run.state + local * layout.total + layout.cls + t * layout.cls_stride,
                     sizeof(float) * size_t(d));
  }
  gelu_rows(s.a, rows * d);
  up_and_residual(run, kSpatial, s.a, rows, s.row_table, s.row_scale);
}

inline void bcast_forward(const ForwardCall& call, float* workspace) {
  const Problem& p = call.problem;
  const ForwardPlan plan = plan_forward(p, call.saved != nullptr, call.threads);
  const ForwardWeights weights = pack_forward(call, workspace);
  float* state = workspace + plan.weights;
  float* scratch = state + plan.state;
  const i64 all[2] = {row_blocks_per_clip(p, 0), row_blocks_per_clip(p, 1)};

  if (plan.save)
    for (i64 clip = 1; clip <= p.batch; ++clip)
      __builtin_memset(call.saved + clip * plan.layout.total - read_slack(p), 0, sizeof(float) * size_t(read_slack(p)));
  for (i64 first = 0; first < p.batch; first += plan.clips_in_flight) {
    const i64 clips = min_of(plan.clips_in_flight, p.batch - first);
    const ForwardRun run{call, plan, weights, call.saved ? call.saved + first * plan.layout.total : state, first};
    parallel_for(clips * (all[0] + all[1]), call.threads, [&](i64 task, int thread) {
      const ForwardScratch s = forward_scratch(plan, scratch + thread * plan.scratch);
      const int stream = task < clips * all[0] ? 0 : 1;
      forward_rows(run, stream, stream ? task - clips * all[0] : task, s);
    });
    // The direction with the longer window first: its tasks are the longest.
    const i64 s2t = has_direction(p, 1) ? clips * plan.cut[1].tasks_per_clip : 0;
    const i64 t2s = has_direction(p, 0) ? clips * plan.cut[0].tasks_per_clip : 0;
    const i64 cls_rows = has_direction(p, 0) ? clips * p.frames : 0;
    parallel_for(s2t + t2s + ceil_div(cls_rows, kRowBlock), call.threads, [&](i64 task, int thread) {
      const ForwardScratch s = forward_scratch(plan, scratch + thread * plan.scratch);
      if (task < s2t) return forward_queries(run, 1, task, s);
      if (task < s2t + t2s) return forward_queries(run, 0, task - s2t, s);
      const i64 row = (task - s2t - t2s) * kRowBlock;
      forward_cls(run, row, min_of(kRowBlock, cls_rows - row), s);
    });
  }
}

CAST_ISA_END
