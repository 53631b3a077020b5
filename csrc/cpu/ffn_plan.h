// How an FFN's rows and hidden columns are cut, and its forward weights in panel order.
#pragma once

#include "ffn_problem.h"
#include "pack.h"
#include "threads.h"

CAST_ISA_BEGIN

// Most hidden columns at a time: two chains of the second product.
constexpr i64 kHiddenChunk = 384;
static_assert(kHiddenChunk % kTileColumns == 0, "a chunk is whole panels");

// Consecutive rows make a task: few enough for its buffers to stay in the second-level cache, enough to hide the
// weights passing by. Forward has two buffers of [rows, dim] and one of [rows, kHiddenChunk].
struct FFNCut {
  i64 rows, tasks;
};

// Measured with one thread on a busy Zen 3 (512 KiB), forward at D = 768, F = 3072, A = 192, in GFLOP/s: 87 for 30
// rows, 91 for 48 and for 96; 90 with chunks of 192 columns. More rows would leave fewer tasks to balance threads with.
CAST_INLINE FFNCut ffn_cut(const FFNProblem& p) {
#if defined(__AVX512F__)
  constexpr i64 cache = 768 * 1024 / 4;
#else
  constexpr i64 cache = 384 * 1024 / 4;
#endif
  const i64 fits = cache / (2 * p.dim + kHiddenChunk) / kTileRows * kTileRows;
  const i64 most = min_of(max_of(fits, 4 * kTileRows), kRowBlock);
  // Equal blocks of whole row tiles, so that no task is left nearly empty.
  const i64 rows = round_up(ceil_div(p.rows, ceil_div(p.rows, most)), kTileRows);
  return {rows, ceil_div(p.rows, rows)};
}

struct HiddenChunk {
  i64 first, width;
};
CAST_INLINE i64 hidden_chunk_width(i64 width) {
  return round_up(ceil_div(width, ceil_div(width, kHiddenChunk)), kTileColumns);
}
CAST_INLINE i64 hidden_chunks(i64 width) { return width ? ceil_div(width, hidden_chunk_width(width)) : 0; }
CAST_INLINE HiddenChunk hidden_chunk(i64 width, i64 index) {
  const i64 each = hidden_chunk_width(width), first = index * each;
  return {first, min_of(each, width - first)};
}

// f(activation of a vector) for the branch's activation; the choice is made outside of all loops.
template <class F>
CAST_INLINE void with_activation(const FFNProblem& p, int branch, const F& f) {
  if (branch == kFFN && p.activation == kQuickGelu)
    f([](vec x) { return quick_gelu(x); }, [](vec x) { return quick_gelu_slope(x); });
  else
    f([](vec x) { return gelu(x); }, [](vec x) { return gelu_slope(x); });
}

struct FFNForwardWeights {
  Panels in[2], out[2];
};

inline i64 ffn_packed_size(const FFNProblem& p) {
  i64 floats = 0;
  for (int b = 0; b < 2; ++b) floats += packed_size(p.dim, p.width[b]) + packed_size(p.width[b], p.dim);
  return align16(floats);
}

// Where ffn_pack puts the panels; adds what must be done to `jobs` if there are any.
inline FFNForwardWeights ffn_forward_weights(const FFNProblem& p, const FFNParameters* parameters, const float* packed,
                                             PackJobs* jobs) {
  FFNForwardWeights w{};
  const auto next = [&](i64 depth, i64 columns, const float* weight) {
    const Panels panels{packed, depth, columns, depth * kTileColumns, kHasBf16 && p.bf16};
    if (jobs) add_pack_job(*jobs, weight, const_cast<float*>(packed), depth, columns, depth * kTileColumns, true,
                            panels.bf16);
    packed += packed_size(depth, columns);
    return panels;
  };
  for (int b = 0; b < 2; ++b) {
    if (!p.width[b]) continue;
    w.in[b] = next(p.dim, p.width[b], jobs ? parameters->branch[b].in_weight : nullptr);
    w.out[b] = next(p.width[b], p.dim, jobs ? parameters->branch[b].out_weight : nullptr);
  }
  return w;
}

inline void ffn_pack(const FFNProblem& p, const FFNParameters& parameters, float* to, int threads) {
  PackJobs jobs{};
  ffn_forward_weights(p, &parameters, to, &jobs);
  parallel_for(jobs.tasks, threads, [&](i64 task, int) { run_pack_job(jobs, task); });
}

CAST_ISA_END
