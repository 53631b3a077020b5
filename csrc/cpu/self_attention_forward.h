// Self-attention forward: two phases per group of batch entries.
//
// 1 rows:    LayerNorm -> queries, keys, values, scattered head by head
// 2 queries: attention of all heads -> output projection -> adapter -> residual
#pragma once

#include "attention.h"
#include "layernorm.h"
#include "pack.h"
#include "row_tables.h"
#include "self_attention.h"
#include "threads.h"

CAST_ISA_BEGIN

// The cut of a group's queries into tasks: several whole entries, or a part of one. Parts are whole query groups, or
// halves of them if whole ones make too few tasks. A remainder of less than half a part joins the last part. Results do
// not depend on the cut, because queries are independent.
struct SelfQueryCut {
  i64 entries, part, parts;
};
constexpr i64 kSmallPart = (kQueryGroup / 2 + kMaxQueries - 1) / kMaxQueries * kMaxQueries;
constexpr i64 kMostQueryRows = (kQueryGroup + kQueryGroup / 2 + kTileRows - 1) / kTileRows * kTileRows;
static_assert(kMostQueryRows >= kRowBlock, "one buffer serves both phases");

CAST_INLINE SelfQueryCut self_query_cut(const SelfAttentionProblem& p, int threads) {
  const auto cut = [&](i64 part) {
    if (p.tokens < part) return SelfQueryCut{part / p.tokens, p.tokens, 1};
    return SelfQueryCut{1, part, (p.tokens + part / 2) / part};
  };
  const SelfQueryCut wide = cut(kQueryGroup);
  const i64 tasks = ceil_div(entries_in_flight(p), wide.entries) * wide.parts;
  return tasks >= 4 * threads ? wide : cut(kSmallPart);
}

struct SelfQueries {
  i64 entry, entries, first, tokens;  // tokens of each entry, from `first`
};
CAST_INLINE SelfQueries self_queries(const SelfAttentionProblem& p, const SelfQueryCut& cut, i64 entries, i64 task) {
  const i64 entry = task / cut.parts * cut.entries, part = task % cut.parts, first = part * cut.part;
  const i64 end = part == cut.parts - 1 ? p.tokens : first + cut.part;
  return {entry, min_of(cut.entries, entries - entry), first, end - first};
}

struct SelfWeights {
  Panels qkv, proj, down, up;
};
CAST_INLINE i64 self_attention_packed_size(const SelfAttentionProblem& p) {
  return align16(packed_size(p.dim, 3 * p.dim) + packed_size(p.dim, p.dim) + packed_size(p.dim, p.adapter) +
                 packed_size(p.adapter, p.dim) + 64);
}

inline SelfWeights pack_self_attention(const SelfAttentionProblem& p, const SelfAttentionParameters& w, float* at,
                                       int threads) {
  PackJobs jobs;
  const auto add = [&](const float* weight, i64 depth, i64 columns) {
    return add_next_pack_job(jobs, weight, at, depth, columns, true, kHasBf16 && p.bf16);
  };
  SelfWeights panels{};
  panels.qkv = add(w.qkv_weight, p.dim, 3 * p.dim);
  panels.proj = add(w.proj_weight, p.dim, p.dim);
  if (p.adapter) {
    panels.down = add(w.down_weight, p.dim, p.adapter);
    panels.up = add(w.up_weight, p.adapter, p.dim);
  }
  run_pack_jobs(jobs, threads);
  return panels;
}

CAST_INLINE i64 self_group_rows(const SelfAttentionProblem& p) { return entries_in_flight(p) * p.tokens; }

// One thread: row offsets, [rows, dim] of attention's output, a block of the adapter's rows, attention's scratch.
struct SelfScratch {
  i64* slots;
  float *a, *b, *hidden, *attention;
};
CAST_INLINE i64 self_scratch_size(const SelfAttentionProblem& p) {
  return align16(2 * kRowBlock) + align16(kMostQueryRows * p.dim) + align16(kRowBlock * p.dim) +
         align16(kRowBlock * p.adapter) + attention_scratch_size(head_dim(p)) + 64;
}
CAST_INLINE SelfScratch self_scratch(const SelfAttentionProblem& p, float* at) {
  SelfScratch s;
  s.slots = reinterpret_cast<i64*>(at);
  s.a = at + align16(2 * kRowBlock);
  s.b = s.a + align16(kMostQueryRows * p.dim);
  s.hidden = s.b + align16(kRowBlock * p.dim);
  s.attention = s.hidden + align16(kRowBlock * p.adapter);
  return s;
}

CAST_INLINE bool keeps_qkv(const SelfAttentionProblem& p, bool save) { return save && p.recompute != kAll; }

inline i64 self_attention_workspace(const SelfAttentionProblem& p, bool save, int threads) {
  const i64 state = keeps_qkv(p, save) ? 0 : align16(self_group_rows(p) * 3 * p.dim + read_slack(p));
  return self_attention_packed_size(p) + state + self_scratch_size(p) * threads;
}

// A product with head-major result: row r goes to to + slots[r], and heads are `matrix` floats apart. If the columns
// of a head are whole panels, the product runs head by head and needs no division to find a column's place.
inline void to_heads(const float* a, i64 lda, i64 rows, const Panels& weight, const float* bias, i64 head_dim,
                     i64 matrix, const i64* slots, float* to) {
  if (head_dim % kTileColumns == 0 && !weight.bf16) {  // in bfloat16, `a` would be rounded once a head
    for (i64 column = 0; column < weight.columns; column += head_dim, to += matrix) {
      const Panels head = column_slice(weight, column, head_dim);
      gemm(
          a, lda, rows, head, bias ? bias + column : nullptr,
          [=](i64 row, i64 c, auto& v, i64 lanes) { store_row(to + slots[row] + c, v, lanes); },
          [=](i64 row, i64 c) { prefetch_row(to + slots[row] + c); });
    }
    return;
  }
  const HeadMajorRow heads{head_dim, matrix};
  gemm(a, lda, rows, weight, bias,
       [=](i64 row, i64 column, auto& v, i64 lanes) { heads.put(to + slots[row], column, v, lanes); });
}

// Queries, keys and values of `count` rows from row `first` of a group; `x` is the group's input, `qkv` its matrices.
// `statistics` is null if they are not kept.
inline void project_qkv(const SelfAttentionProblem& p, const SelfAttentionParameters& w, const Panels& weight,
                        const float* x, i64 first, i64 count, float* qkv, float* statistics, float* normed,
                        i64* slots) {
  const i64 D = p.dim, hd = head_dim(p);
  for (i64 r = 0; r < count; ++r) {
    const i64 row = first + r;
    const RowStatistics s = row_statistics(x + row * D, D, p.eps);
    if (statistics) statistics[2 * row] = s.mean, statistics[2 * row + 1] = s.rstd;
    for (i64 c = 0; c < D; c += kLanes)
      store_first(normed + r * D + c, normalised(x + row * D, s, w.norm_weight, w.norm_bias, c, D - c), D - c);
    slots[r] = row / p.tokens * p.tokens * 3 * D + row % p.tokens * hd;
  }
  to_heads(normed, D, count, weight, w.qkv_bias, hd, p.tokens * hd, slots, qkv);
}

struct SelfRun {
  const SelfAttentionForward& call;
  const SelfWeights& weights;
  SelfAttentionSaved layout;
  float* qkv;               // of the group's first entry
  i64 first_entry, entries;

  i64 first_row() const { return first_entry * call.problem.tokens; }
};

// s.a [rows, dim] = attention of all heads for the block's queries.
inline void attend_heads(const SelfRun& run, const SelfQueries& block, const SelfScratch& s) {
  const SelfAttentionProblem& p = run.call.problem;
  const i64 hd = head_dim(p), matrix = p.tokens * hd;
  const AttentionScratch scratch = attention_scratch(s.attention, hd);
  // exp(x) is computed as 2^(x log2 e), so log2 e joins the softmax scale.
  const float scale_log2 = 1.44269504088896f / __builtin_sqrtf(float(hd));
  for (i64 e = 0; e < block.entries; ++e)
    for (i64 h = 0; h < p.heads; ++h) {
      const float* query = run.qkv + ((block.entry + e) * 3 * p.heads + h) * matrix;
      const float *key = query + p.heads * matrix, *value = key + p.heads * matrix;
      const i64 statistic = ((run.first_entry + block.entry + e) * p.heads + h) * p.tokens + block.first;
      float* saved = run.call.saved;
      attend({query + block.first * hd, key, value, block.tokens, p.tokens, hd}, scale_log2, scratch,
             {s.a + e * block.tokens * p.dim + h * hd, p.dim, saved ? saved + run.layout.row_max + statistic : nullptr,
              saved ? saved + run.layout.inverse_sum + statistic : nullptr});
    }
}

// Output projection, adapter and residual of `rows` rows of attention's output, from row `row` of the batch.
inline void self_output(const SelfRun& run, const float* attended, i64 row, i64 rows, const SelfScratch& s) {
  const SelfAttentionProblem& p = run.call.problem;
  const SelfAttentionParameters& w = run.call.parameters;
  const i64 D = p.dim, A = p.adapter;
  const float* x = run.call.input + row * D;
  float *y = run.call.output + row * D, *saved = run.call.saved;
  const auto prefetch = [=](i64 r, i64 column) {
    __builtin_prefetch(x + r * D + column);
    prefetch_row(y + r * D + column);
  };
  if (!A) {
    gemm(
        attended, D, rows, run.weights.proj, w.proj_bias,
        [=](i64 r, i64 column, auto& v, i64 lanes) {
          const i64 at = r * D + column;
          each(v, lanes, [=](i64 c, vec a, i64 n) { store_first(y + at + c, load_first(x + at + c, n) + a, n); });
        },
        prefetch);
    return;
  }
  gemm(attended, D, rows, run.weights.proj, w.proj_bias,
       [=, to = s.b](i64 r, i64 column, auto& v, i64 lanes) { store_row(to + r * D + column, v, lanes); });
  gemm(s.b, D, rows, run.weights.down, w.down_bias,
       [=, to = s.hidden](i64 r, i64 column, auto& v, i64 lanes) { store_row(to + r * A + column, v, lanes); });
  if (saved && p.recompute == kNothing) {
    __builtin_memcpy(saved + run.layout.projected + row * D, s.b, sizeof(float) * size_t(rows * D));
    __builtin_memcpy(saved + run.layout.hidden + row * A, s.hidden, sizeof(float) * size_t(rows * A));
  }
  gelu_rows(s.hidden, rows * A);
  gemm(
      s.hidden, A, rows, run.weights.up, w.up_bias,
      [=, projected = s.b](i64 r, i64 column, auto& v, i64 lanes) {
        const i64 at = r * D + column;
        each(v, lanes, [=](i64 c, vec up, i64 n) {
          store_first(y + at + c, load_first(x + at + c, n) + load_first(projected + at + c, n) + up, n);
        });
      },
      prefetch);
}

inline void self_queries_forward(const SelfRun& run, const SelfQueryCut& cut, i64 task, const SelfScratch& s) {
  const SelfAttentionProblem& p = run.call.problem;
  const SelfQueries block = self_queries(p, cut, run.entries, task);
  const i64 D = p.dim, rows = block.entries * block.tokens;
  const i64 row = run.first_row() + block.entry * p.tokens + block.first;
  attend_heads(run, block, s);
  if (run.call.saved)
    __builtin_memcpy(run.call.saved + run.layout.attended + row * D, s.a, sizeof(float) * size_t(rows * D));
  // Blocks of whole tiles, about equal, so that the left operand stays in L2.
  const i64 step = round_up(ceil_div(rows, ceil_div(rows, kRowBlock)), kTileRows);
  for (i64 r = 0; r < rows; r += step) self_output(run, s.a + r * D, row + r, min_of(step, rows - r), s);
}

inline void self_attention_forward(const SelfAttentionForward& call, float* workspace) {
  const SelfAttentionProblem& p = call.problem;
  const SelfAttentionSaved layout = saved_layout(p);
  const i64 D = p.dim, group = entries_in_flight(p);
  const bool keep = keeps_qkv(p, call.saved != nullptr);
  const SelfWeights weights = pack_self_attention(p, call.parameters, workspace, call.threads);
  float* state = workspace + self_attention_packed_size(p);
  float* scratch = state + (keep ? 0 : align16(self_group_rows(p) * 3 * D + read_slack(p)));
  const SelfQueryCut cut = self_query_cut(p, call.threads);
  if (call.saved) __builtin_memset(call.saved + layout.total - read_slack(p), 0, sizeof(float) * size_t(read_slack(p)));

  for (i64 first = 0; first < p.batch; first += group) {
    const i64 entries = min_of(group, p.batch - first), rows = entries * p.tokens;
    const SelfRun run{call,  weights, layout, keep ? call.saved + layout.qkv + first * p.tokens * 3 * D : state,
                      first, entries};
    float* statistics = call.saved ? call.saved + layout.statistics + 2 * run.first_row() : nullptr;
    parallel_for(ceil_div(rows, kRowBlock), call.threads, [&](i64 task, int thread) {
      const SelfScratch s = self_scratch(p, scratch + thread * self_scratch_size(p));
      const i64 row = task * kRowBlock;
      project_qkv(p, call.parameters, weights.qkv, call.input + run.first_row() * D, row, min_of(kRowBlock, rows - row),
                  run.qkv, statistics, s.a, s.slots);
    });
    parallel_for(ceil_div(entries, cut.entries) * cut.parts, call.threads, [&](i64 task, int thread) {
      self_queries_forward(run, cut, task, self_scratch(p, scratch + thread * self_scratch_size(p)));
    });
  }
}

CAST_ISA_END
