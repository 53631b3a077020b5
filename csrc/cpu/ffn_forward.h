// FFN forward: one pass over blocks of rows, each through LayerNorm, the adapter and the FFN.
//
// A task's normalised rows, a chunk of hidden columns and the sum of the branches stay in the second-level cache, while
// the weights stream past. No hidden value reaches main memory unless forward keeps it.
#pragma once

#include "ffn_plan.h"
#include "layernorm.h"

CAST_ISA_BEGIN

struct FFNForwardPlan {
  FFNCut cut;
  i64 weights, scratch;  // floats
};

inline FFNForwardPlan plan_ffn_forward(const FFNProblem& p) {
  FFNForwardPlan plan{ffn_cut(p), ffn_packed_size(p), 0};
  const i64 rows = plan.cut.rows;
  plan.scratch = 2 * align16(rows * p.dim) + align16(rows * kHiddenChunk) + align16(rows) + 64;
  return plan;
}

inline i64 ffn_forward_workspace(const FFNProblem& p, int threads) {
  const FFNForwardPlan plan = plan_ffn_forward(p);
  return plan.weights + plan.scratch * threads;
}

struct FFNForwardScratch {
  float *normed, *sum, *hidden, *factor;
};
inline FFNForwardScratch ffn_forward_scratch(const FFNProblem& p, i64 rows, float* at) {
  FFNForwardScratch s;
  s.normed = at;
  s.sum = s.normed + align16(rows * p.dim);
  s.hidden = s.sum + align16(rows * p.dim);
  s.factor = s.hidden + align16(rows * kHiddenChunk);
  return s;
}

// hidden [rows, chunk] = activation(normed W_in^T + b); `kept` [rows, kept_stride] receives the values before the
// activation.
inline void ffn_hidden(const FFNProblem& p, int branch, const float* normed, i64 rows, const Panels& in,
                       const float* bias, float* hidden, float* kept, i64 kept_stride) {
  const i64 width = in.columns;
  gemm(normed, p.dim, rows, in, bias,
       [=](i64 row, i64 column, auto& v, i64 lanes) { store_row(hidden + row * width + column, v, lanes); });
  if (kept)
    for (i64 r = 0; r < rows; ++r)
      __builtin_memcpy(kept + r * kept_stride, hidden + r * width, sizeof(float) * size_t(width));
  with_activation(p, branch, [&](const auto& value, const auto&) {
    const i64 floats = rows * width;
    for (i64 i = 0; i < floats; i += kLanes)
      store_first(hidden + i, value(load_first(hidden + i, floats - i)), floats - i);
  });
}

// Adds a chunk's share of the branch's output to the rows' sum. If `y` is not null, the share is the block's last and
// `y` receives x + sum + share.
inline void ffn_output(const FFNProblem& p, int branch, i64 rows, const Panels& out, const float* bias,
                       const FFNForwardScratch& s, const float* x, float* y) {
  const i64 D = p.dim;
  float* sum = s.sum;
  const float* factor = s.factor;
  if (branch == kAdapter)
    return gemm(s.hidden, out.depth, rows, out, bias, [=](i64 row, i64 column, auto& v, i64 lanes) {
      float* at = sum + row * D + column;
      const float f = factor[row];
      each(v, lanes, [=](i64 c, vec part, i64 n) { store_first(at + c, load_first(at + c, n) + part * f, n); });
    });
  if (!y)
    return gemm(s.hidden, out.depth, rows, out, bias, [=](i64 row, i64 column, auto& v, i64 lanes) {
      float* at = sum + row * D + column;
      each(v, lanes, [=](i64 c, vec part, i64 n) { store_first(at + c, load_first(at + c, n) + part, n); });
    });
  gemm(
      s.hidden, out.depth, rows, out, bias,
      [=](i64 row, i64 column, auto& v, i64 lanes) {
        const i64 at = row * D + column;
        each(v, lanes, [=](i64 c, vec part, i64 n) {
          store_first(y + at + c, load_first(x + at + c, n) + (load_first(sum + at + c, n) + part), n);
        });
      },
      [=](i64 row, i64 column) {
        __builtin_prefetch(x + row * D + column);
        prefetch_row(y + row * D + column);
      });
}

inline void ffn_forward_rows(const FFNForwardCall& call, const FFNCut& cut, const FFNForwardWeights& weights, i64 task,
                             float* scratch) {
  const FFNProblem& p = call.problem;
  const i64 D = p.dim, first = task * cut.rows, rows = min_of(cut.rows, p.rows - first);
  const FFNForwardScratch s = ffn_forward_scratch(p, cut.rows, scratch);
  const FFNSavedLayout layout = ffn_saved_layout(p);
  const float* x = call.x + first * D;

  for (i64 r = 0; r < rows; ++r) {
    const RowStatistics statistics = row_statistics(x + r * D, D, p.eps);
    for (i64 c = 0; c < D; c += kLanes)
      store_first(s.normed + r * D + c,
                  normalised(x + r * D, statistics, call.parameters.norm_weight, call.parameters.norm_bias, c, D - c),
                  D - c);
    if (call.saved) __builtin_memcpy(call.saved + layout.statistics + 2 * (first + r), &statistics, sizeof(statistics));
    s.factor[r] = p.adapter_scale * (call.row_scale ? call.row_scale[first + r] : 1.0f);
  }
  __builtin_memset(s.sum, 0, sizeof(float) * size_t(rows * D));
  // The FFN last: its last chunk writes the output.
  for (int branch = kAdapter; branch >= kFFN; --branch) {
    const i64 width = p.width[branch], chunks = hidden_chunks(width);
    const auto& own = call.parameters.branch[branch];
    for (i64 index = 0; index < chunks; ++index) {
      const HiddenChunk chunk = hidden_chunk(width, index);
      float* kept = call.saved && p.keep ? call.saved + layout.hidden[branch] + first * width + chunk.first : nullptr;
      const Panels in = column_slice(weights.in[branch], chunk.first, chunk.width);
      const Panels out = depth_slice(weights.out[branch], chunk.first, chunk.width);
      ffn_hidden(p, branch, s.normed, rows, in, own.in_bias + chunk.first, s.hidden, kept, width);
      const bool last = branch == kFFN && index == chunks - 1;
      ffn_output(p, branch, rows, out, index == 0 ? own.out_bias : nullptr, s, x, last ? call.y + first * D : nullptr);
    }
  }
}

inline void ffn_forward(const FFNForwardCall& call, float* workspace) {
  const FFNProblem& p = call.problem;
  const FFNForwardPlan plan = plan_ffn_forward(p);
  const FFNForwardWeights weights = pack_ffn(p, call.parameters, workspace, call.threads);
  float* scratch = workspace + plan.weights;
  parallel_for(plan.cut.tasks, call.threads, [&](i64 task, int thread) {
    ffn_forward_rows(call, plan.cut, weights, task, scratch + thread * plan.scratch);
  });
}

CAST_ISA_END
