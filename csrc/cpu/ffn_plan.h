// The cut of an FFN's rows and hidden columns, and its packed forward weights.
#pragma once

#include "ffn_problem.h"
#include "pack.h"
#include "threads.h"

CAST_ISA_BEGIN

// At most this many hidden columns at a time: two chains of the second product.
constexpr i64 kHiddenChunk = 384;
static_assert(kHiddenChunk % kTileColumns == 0, "a chunk is whole panels");

// A task is consecutive rows: few enough for its buffers to stay in the second-level cache, enough to hide the loads of
// the weights. Forward has two buffers of [rows, dim] and one of [rows, kHiddenChunk].
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

// Calls f(activation, its slope) with the branch's functions of a vector. The choice is made outside of all loops.
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

inline FFNForwardWeights pack_ffn(const FFNProblem& p, const FFNParameters& parameters, float* at, int threads) {
  FFNForwardWeights w{};
  PackJobs jobs;
  const auto add = [&](const float* weight, i64 depth, i64 columns) {
    return add_next_pack_job(jobs, weight, at, depth, columns, true, kHasBf16 && p.bf16);
  };
  for (int b = 0; b < 2; ++b) {
    if (!p.width[b]) continue;
    w.in[b] = add(parameters.branch[b].in_weight, p.dim, p.width[b]);
    w.out[b] = add(parameters.branch[b].out_weight, p.width[b], p.dim);
  }
  run_pack_jobs(jobs, threads);
  return w;
}

CAST_ISA_END
