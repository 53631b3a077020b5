// Copies of weights in the panel order that `gemm` reads.
#pragma once

#include "gemm.h"

CAST_ISA_BEGIN

// One panel of a linear layer's right operand W^T, from torch's [columns, depth].
inline void pack_panel_transposed(const float* weight, i64 depth, i64 columns, i64 panel, bool bf16, float* to) {
  const i64 first = panel * kTileColumns;
  for (int c = 0; c < kTileVecs; ++c) {
    const i64 column = first + c * kLanes, valid = min_of(kLanes, columns - column);
    for (i64 k = 0; k < depth; k += kLanes) {
      vec block[kLanes];
      for (int r = 0; r < kLanes; ++r)
        block[r] = r < valid ? load_first(weight + (column + r) * depth + k, depth - k) : vec{};
      transpose(block);
      const i64 rows = min_of(kLanes, depth - k);  // the block is zero behind them
      for (i64 r = 0; r < rows; r += bf16 ? 2 : 1)
        store(to + panel_row(k + r, bf16) + c * kLanes, bf16 ? pair_words(block[r], block[r + 1]) : block[r]);
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

// A list of weights to pack, run as one set of tasks (one per panel).
struct PackJobs {
  struct Job {
    const float* weight;
    float* to;
    i64 depth, columns, panel_stride, first_task;
    bool transposed, bf16;
  };
  Job jobs[16];
  int count;
  i64 tasks;
};

inline Panels add_pack_job(PackJobs& list, const float* weight, float* to, i64 depth, i64 columns, i64 panel_stride,
                           bool transposed, bool bf16 = false) {
  list.jobs[list.count++] = {weight, to, depth, columns, panel_stride, list.tasks, transposed, bf16};
  list.tasks += panel_count(columns);
  return {to, depth, columns, panel_stride, bf16};
}

inline void run_pack_job(const PackJobs& list, i64 task) {
  int j = list.count - 1;
  while (list.jobs[j].first_task > task) --j;
  const PackJobs::Job& job = list.jobs[j];
  const i64 panel = task - job.first_task;
  float* to = job.to + panel * job.panel_stride;
  if (job.transposed)
    pack_panel_transposed(job.weight, job.depth, job.columns, panel, job.bf16, to);
  else
    pack_panel_plain(job.weight, job.depth, job.columns, panel, job.bf16, to);
}

CAST_ISA_END
