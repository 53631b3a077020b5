// Weights in the panel order that `gemm` reads.
//
// Every call packs its weights, so it uses their values at its start, whoever wrote them. A copy kept between calls
// would save 1 to 3 % of an inference and could be stale: no counter sees a write by another process, through a NumPy
// view, or by a fused optimizer. docs/cpu.md has the measurements.
#pragma once

#include "gemm.h"
#include "job_list.h"
#include "threads.h"

CAST_ISA_BEGIN

// Rows k .. k + rows of a panel, from the block's vectors; in bfloat16 a row holds two depths.
template <bool kWords>
CAST_INLINE void store_block(const vec (&block)[kLanes], i64 k, i64 rows, float* to) {
#pragma GCC unroll 16
  for (i64 r = 0; r < rows; r += kWords ? 2 : 1)
    store(to + panel_row(k + r, kWords), kWords ? pair_words(block[r], block[r + 1]) : block[r]);
}

// One panel of a linear layer's right operand W^T, from torch's [columns, depth]. The next panel's weights follow in
// memory, so their lines are prefetched in order while this one is transposed.
template <bool kWords>
inline void pack_panel_transposed(const float* weight, i64 depth, i64 columns, i64 panel, float* to) {
  const i64 first = panel * kTileColumns;
  const float* behind = weight + (first + kTileColumns) * depth;
  for (int c = 0; c < kTileVecs; ++c, to += kLanes) {
    const i64 column = first + c * kLanes, valid = min_of(kLanes, columns - column);
    const float* from = weight + column * depth;
    for (i64 k = 0; k < depth; k += kLanes) {
      const float* ahead = behind + (c * depth + k) * kLanes;
#pragma GCC unroll 16
      for (int line = 0; line < kLanes * kLanes; line += 16) __builtin_prefetch(ahead + line, 0, 2);
      const i64 rows = min_of(kLanes, depth - k);
      vec block[kLanes];
      if (rows == kLanes && valid == kLanes) {  // literal counts: the block stays in registers
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) block[r] = load(from + r * depth + k);
        transpose(block);
        store_block<kWords>(block, k, kLanes, to);
        continue;
      }
      for (int r = 0; r < kLanes; ++r) block[r] = r < valid ? load_first(from + r * depth + k, rows) : vec{};
      transpose(block);  // zero behind `rows` and `valid`
      store_block<kWords>(block, k, rows, to);
    }
  }
}

// One panel of the operand W itself, for gradients of a linear layer's input: depth runs over W's rows.
inline void pack_panel_plain(const float* weight, i64 depth, i64 columns, i64 panel, bool bf16, float* to) {
  for (i64 k = 0; k < depth; k += bf16 ? 2 : 1)
    for (int c = 0; c < kTileVecs; ++c) {
      const i64 column = panel * kTileColumns + c * kLanes;
      const auto row = [=](i64 at) {
        return at < depth && column < columns ? load_first(weight + at * columns + column, columns - column) : vec{};
      };
      store(to + panel_row(k, bf16) + c * kLanes, bf16 ? pair_words(row(k), row(k + 1)) : row(k));
    }
}

// A task is consecutive panels: most of them find their lines prefetched.
constexpr i64 kPackedTogether = 4;

struct PackJob {
  static constexpr const char* kList = "PackJobs";
  const float* weight;
  float* to;
  i64 depth, columns, panel_stride;
  bool transposed, bf16;
};

using PackJobs = JobList<PackJob, 16>;

inline Panels add_pack_job(PackJobs& list, const float* weight, float* to, i64 depth, i64 columns, i64 panel_stride,
                           bool transposed, bool bf16) {
  list.add({weight, to, depth, columns, panel_stride, transposed, bf16},
           ceil_div(panel_count(columns), kPackedTogether));
  return {to, depth, columns, panel_stride, bf16};
}

// The same at `at`; moves `at` behind the panels.
inline Panels add_next_pack_job(PackJobs& list, const float* weight, float*& at, i64 depth, i64 columns,
                                bool transposed, bool bf16) {
  const Panels packed = add_pack_job(list, weight, at, depth, columns, depth * kTileColumns, transposed, bf16);
  at += packed_size(depth, columns);
  return packed;
}

inline void run_pack_job(const PackJob& job, i64 task) {
  const i64 first = task * kPackedTogether;
  for (i64 panel = first; panel < min_of(first + kPackedTogether, panel_count(job.columns)); ++panel) {
    float* to = job.to + panel * job.panel_stride;
    if (job.transposed && job.bf16)
      pack_panel_transposed<true>(job.weight, job.depth, job.columns, panel, to);
    else if (job.transposed)
      pack_panel_transposed<false>(job.weight, job.depth, job.columns, panel, to);
    else
      pack_panel_plain(job.weight, job.depth, job.columns, panel, job.bf16, to);
  }
}

inline void run_pack_jobs(const PackJobs& list, int threads) {
  parallel_for(list.tasks(), threads, [&](i64 task, int) { list.run(task, run_pack_job); });
}

CAST_ISA_END
