// Kernel `position_sums`: sums of dQ and of dKV over the rows at each position of a window.
//
// A table's gradient is linear in them, so products of the table's rows remain where every row's would be needed; the
// sums of all positions are the gradients of the biases. A position has as many members as there are windows; a CTA adds
// a share of them for 384 columns, `finish` adds the shares.
#include "bcast_arguments.h"
#include "numbers.cuh"

namespace cast::cuda {
namespace {

constexpr int SUM_THREADS = 192, SUM_COLUMNS = 2 * SUM_THREADS;

// The row of a position's member: its windows are all other coordinates.
CAST_DEVICE int member_row(const PositionSum& t, int member, int position, int frames, int patches) {
  int frame, patch;  // frame of all clips
  if (t.in_time) {
    frame = member / patches * frames + position;
    patch = member % patches;
  } else if (t.length == patches) {
    frame = member;
    patch = position;
  } else {
    frame = member * frames + position / patches;
    patch = position % patches;
  }
  return frame * t.tokens.frame_rows + t.tokens.cls + patch;
}

template <class T>
CAST_DEVICE void position_sums(const PositionSumsArguments& g) {
  int number = g.count - 1;
  while (static_cast<int>(blockIdx.x) < g.tables[number].first_cta) --number;
  const PositionSum& t = g.tables[number];
  const int cta = blockIdx.x - t.first_cta, across = (t.width + SUM_COLUMNS - 1) / SUM_COLUMNS;
  const int column = cta % across * SUM_COLUMNS + 2 * threadIdx.x;
  const int position = cta / across % t.length, split = cta / across / t.length;
  if (column >= t.width) return;
  const int members = g.clips * g.frames * g.patches / t.length;
  const T* from = static_cast<const T*>(t.from) + column;
  float2 sum = make_float2(0.f, 0.f);
  const int share = (members + t.splits - 1) / t.splits, end = min((split + 1) * share, members);
  for (int member = split * share; member < end; ++member) {
    const int64_t row = member_row(t, member, position, g.frames, g.patches);
    const float2 v = unpack<T>(*reinterpret_cast<const uint32_t*>(from + row * t.width));
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
