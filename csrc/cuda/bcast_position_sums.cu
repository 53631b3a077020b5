// Kernel `position_sums`: sums of dQ and of dKV over the rows at each position of a window.
//
// A table's gradient is linear in them, so products of the table's rows remain where every row's would be needed; the
// sums of all positions are the gradients of the biases. A position has as many members as there are windows; a CTA adds
// a share of them for 384 columns, `finish` adds the shares.
#include <climits>

#include "bcast_arguments.h"
#include "numbers.cuh"

namespace cast::cuda {
namespace {

constexpr int SUM_THREADS = 192, SUM_COLUMNS = 2 * SUM_THREADS;

// The rows of a position's members, one after the other: its windows are all other coordinates.
struct Members {
  int row, step;  // from one to the next
  int left, run, jump;  // members until the next clip; of a clip; and what that adds to the row

  CAST_DEVICE Members(const PositionSum& t, int first, int position, int frames, int patches) : jump(0) {
    const int frame_rows = t.tokens.frame_rows, clip_rows = frames * frame_rows;
    run = left = INT_MAX;
    if (t.in_time) {
      row = first / patches * clip_rows + position * frame_rows + first % patches;
      step = 1;
      left = patches - first % patches;
      run = patches;
      jump = clip_rows - patches;
    } else {  // a patch, or both
      step = t.length == patches ? frame_rows : clip_rows;
      row = first * step + position / patches * frame_rows + position % patches;
    }
    row += t.tokens.cls;
  }

  CAST_DEVICE void next() {
    row += step;
    if (--left == 0) {
      row += jump;
      left = run;
    }
  }
};

template <class T>
CAST_DEVICE void position_sums(const PositionSumsArguments& g) {
  int number = g.count - 1;
  while (static_cast<int>(blockIdx.x) < g.tables[number].first_cta) --number;
  const PositionSum& t = g.tables[number];
  const int cta = blockIdx.x - t.first_cta, across = (t.width + SUM_COLUMNS - 1) / SUM_COLUMNS;
  const int column = cta % across * SUM_COLUMNS + 2 * threadIdx.x;
  const int position = cta / across % t.length, split = cta / across / t.length;
  if (column >= t.width) return;
  const int count = g.clips * g.frames * g.patches / t.length;
  const T* from = static_cast<const T*>(t.from) + column;
  float2 sum = make_float2(0.f, 0.f);
  const int share = (count + t.splits - 1) / t.splits, end = min((split + 1) * share, count);
  Members members(t, split * share, position, g.frames, g.patches);
#pragma unroll 8
  for (int member = split * share; member < end; ++member, members.next()) {
    const float2 v = unpack<T>(*reinterpret_cast<const uint32_t*>(from + int64_t(members.row) * t.width));
    sum.x += v.x;
    sum.y += v.y;
  }
  *reinterpret_cast<float2*>(t.to + (int64_t(split) * t.length + position) * t.width + column) = sum;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    bcast_position_sums_bf16(const __grid_constant__ PositionSumsArguments g) {
  position_sums<bf16>(g);
}
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    bcast_position_sums_fp16(const __grid_constant__ PositionSumsArguments g) {
  position_sums<fp16>(g);
}

}  // namespace cast::cuda
