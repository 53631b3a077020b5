// Sizes, staging memory and packed weights of one self-attention backward call.
#pragma once

#include "attention_backward.h"
#include "layer_gradient.h"
#include "self_attention_forward.h"

CAST_ISA_BEGIN

// The parts of backward that a call needs: backward ends at the last wanted gradient.
struct SelfWanted {
  bool norm;   // wanted: LayerNorm's parameters or the input; the whole way
  bool inner;  // wanted: those, or the query-key-value layer; through attention
};
CAST_INLINE SelfWanted self_wanted(const SelfAttentionBackward& call) {
  const SelfAttentionGradients& g = call.gradients;
  const bool norm = call.grad_input || g.norm_weight || g.norm_bias;
  return {norm, norm || g.qkv_weight || g.qkv_bias};
}

// Gradients inside the block and recomputed values, for one group of entries; offsets in floats.
struct SelfStage {
  i64 projected, hidden;  // [rows, dim], [rows, adapter]: computed again, if not kept
  i64 grad_hidden;        // [rows, adapter], before GELU
  i64 grad_projected;     // [rows, dim], of a
  i64 grad_attended;      // [entries][heads][tokens][head_dim]
  i64 grad_qkv;           // [rows, 3 * dim]
  i64 qkv;                // as in SelfAttentionSaved, if not kept
  i64 norm_sums;          // [row blocks][2][dim]: shares of gamma's and beta's gradients
  i64 total;
};

inline SelfStage self_stage(const SelfAttentionProblem& p) {
  SelfStage l{};
  i64 at = 0;
  const i64 rows = entries_in_flight(p) * p.tokens;
  const bool kept = p.recompute == kNothing;
  const auto part = [&](i64 floats) { return take(at, align16(floats)); };
  l.projected = part(p.adapter && !kept ? rows * p.dim : 0);
  l.hidden = part(p.adapter && !kept ? rows * p.adapter : 0);
  l.grad_hidden = part(rows * p.adapter);
  l.grad_projected = part(p.adapter ? rows * p.dim : 0);
  l.grad_attended = part(rows * p.dim);
  l.qkv = part(p.recompute == kAll ? rows * 3 * p.dim : 0);
  l.grad_qkv = part(rows * 3 * p.dim);
  l.norm_sums = part(ceil_div(rows, kRowBlock) * 2 * p.dim);
  l.total = at + align16(3 * read_slack(p));  // row tiles read past the last matrix
  return l;
}

CAST_INLINE i64 self_backward_weights_size(const SelfAttentionProblem& p) {
  const i64 again = packed_size(p.dim, 3 * p.dim) + packed_size(p.dim, p.dim) + packed_size(p.dim, p.adapter);
  return align16(again + packed_size(3 * p.dim, p.dim) + packed_size(p.dim, p.dim) + packed_size(p.dim, p.adapter) +
                 packed_size(p.adapter, p.dim) + 64);
}

// Of one thread, the largest of: row offsets and two [rows, dim] buffers; attention's scratch; a weight block's.
CAST_INLINE i64 self_backward_scratch_size(const SelfAttentionProblem& p) {
  const i64 rows = align16(2 * kRowBlock) + 2 * align16(kRowBlock * p.dim) + align16(p.dim);
  const i64 attention = align16(2 * p.tokens) + align16(p.tokens) + attention_backward_scratch_size(head_dim(p));
  return align16(max_of(max_of(rows, attention), weight_scratch_size())) + 64;
}

inline i64 self_attention_backward_workspace(const SelfAttentionProblem& p, int threads) {
  return self_backward_weights_size(p) + self_stage(p).total + self_backward_scratch_size(p) * threads;
}

struct SelfBackwardWeights {
  SelfWeights again;        // forward's, for recomputed values
  Panels qkv, proj, down, up;  // for gradients of a layer's input
};

inline SelfBackwardWeights pack_self_backward(const SelfAttentionBackward& call, float* at) {
  const SelfAttentionProblem& p = call.problem;
  const SelfAttentionParameters& w = call.parameters;
  SelfBackwardWeights panels{};
  PackJobs jobs;
  const auto add = [&](const float* weight, i64 depth, i64 columns, bool transposed) {
    return add_next_pack_job(jobs, weight, at, depth, columns, transposed, kHasBf16 && p.bf16);
  };
  if (p.adapter) {
    if (p.recompute != kNothing) {
      panels.again.proj = add(w.proj_weight, p.dim, p.dim, true);
      panels.again.down = add(w.down_weight, p.dim, p.adapter, true);
    }
    panels.down = add(w.down_weight, p.adapter, p.dim, false);
    panels.up = add(w.up_weight, p.dim, p.adapter, false);
  }
  if (self_wanted(call).inner) {
    if (p.recompute == kAll) panels.again.qkv = add(w.qkv_weight, p.dim, 3 * p.dim, true);
    panels.proj = add(w.proj_weight, p.dim, p.dim, false);
    panels.qkv = add(w.qkv_weight, 3 * p.dim, p.dim, false);
  }
  run_pack_jobs(jobs, call.threads);
  return panels;
}

// A group of entries on its way through the phases. Pointers are to the group's first row.
struct SelfBackwardRun {
  const SelfAttentionBackward& call;
  const SelfBackwardWeights& weights;
  i64 first_entry, entries, rows;
  const float *input, *grad_output;
  const float *attended, *row_max, *inverse_sum, *statistics;  // kept by forward
  float *projected, *hidden, *qkv;  // kept by forward and only read, or computed again
  float *grad_hidden, *grad_projected, *grad_attended, *grad_qkv, *norm_sums;

  RowStatistics row(i64 r) const { return {statistics[2 * r], statistics[2 * r + 1]}; }
  // Gradient of a: without an adapter it is the output's.
  const float* da() const { return call.problem.adapter ? grad_projected : grad_output; }
};

inline SelfBackwardRun self_backward_run(const SelfAttentionBackward& call, const SelfBackwardWeights& weights,
                                         float* stage, i64 first_entry) {
  const SelfAttentionProblem& p = call.problem;
  const SelfAttentionSaved kept = saved_layout(p);
  const SelfStage made = self_stage(p);
  const i64 entries = min_of(entries_in_flight(p), p.batch - first_entry), row = first_entry * p.tokens, D = p.dim;
  float* saved = const_cast<float*>(call.saved);  // never written: writers check `recompute`
  const bool all = p.recompute == kNothing;
  return {call,
          weights,
          first_entry,
          entries,
          entries * p.tokens,
          call.input + row * D,
          call.grad_output + row * D,
          saved + kept.attended + row * D,
          saved + kept.row_max + row * p.heads,
          saved + kept.inverse_sum + row * p.heads,
          saved + kept.statistics + 2 * row,
          all ? saved + kept.projected + row * D : stage + made.projected,
          all ? saved + kept.hidden + row * p.adapter : stage + made.hidden,
          p.recompute == kAll ? stage + made.qkv : saved + kept.qkv + row * 3 * D,
          stage + made.grad_hidden,
          stage + made.grad_projected,
          stage + made.grad_attended,
          stage + made.grad_qkv,
          stage + made.norm_sums};
}

CAST_ISA_END
