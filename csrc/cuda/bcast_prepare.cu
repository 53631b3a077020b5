// Kernel `prepare`: weights and vectors as the other kernels read them, made anew at every call.
//
//     matrices:  rounded to the compute dtype, where gamma is given W diag(gamma), and transposed for backward
//     vectors:   in float32
//     tables:    (beta + position p) W' + bias, rounded as well, one row for each position of a window, or one for p = 0
//
// CTAs take matrices first, then vectors, then tables. It runs once a call, over 2.4 million weights at the paper's size;
// in a backward with float32 streams it rounds these, too.
#include "bcast_arguments.h"
#include "mma.cuh"

namespace cast::cuda {
namespace {

constexpr int PREPARE_THREADS = 512, SQUARE = 64;
// Shared memory of a CTA: a square in float32, a number more a row for its banks; or two tiles.
constexpr int ROOM = SQUARE * (SQUARE + 1) * sizeof(float);
static_assert(ROOM >= 2 * TILE_BYTES);

// Eight neighbouring numbers.
template <class P>
CAST_DEVICE void load_eight(float (&to)[8], const P* from) {
  constexpr int WORDS = sizeof(P) * 8 / 16;
  uint4 words[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
  const P* numbers = reinterpret_cast<const P*>(words);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = to_float(numbers[i]);
}

template <class T>
CAST_DEVICE uint4 pack_eight(const float (&v)[8]) {
  return make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

template <class T>
CAST_DEVICE void store_eight(T* to, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(to) = pack_eight<T>(v);
}

// A square of a matrix of From, rounded, through shared memory where it is turned. P: of gamma.
template <class T, class From, class P>
CAST_DEVICE void round_matrix(const Matrix& m, int cta, unsigned char* room) {
  float (*square)[SQUARE + 1] = reinterpret_cast<float (*)[SQUARE + 1]>(room);
  const int across = (m.columns + SQUARE - 1) / SQUARE, row = cta / across * SQUARE, column = cta % across * SQUARE;
  const int line = threadIdx.x / (SQUARE / 8), first = threadIdx.x % (SQUARE / 8) * 8;  // eight numbers a thread
  const bool inside = row + line < m.rows && column + first < m.columns;
  if (inside) {
    float v[8];
    load_eight(v, static_cast<const From*>(m.from) + int64_t(row + line) * m.columns + column + first);
    if (m.gamma != nullptr) {
      float gamma[8];
      load_eight(gamma, static_cast<const P*>(m.gamma) + column + first);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= gamma[i];
    }
    if (!m.transposed) store_eight(static_cast<T*>(m.to) + int64_t(row + line) * m.columns + column + first, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) square[first + i][line] = v[i];
  }
  if (!m.transposed) return;
  __syncthreads();
  if (column + line >= m.columns || row + first >= m.rows) return;
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = square[line][first + i];
  store_eight(static_cast<T*>(m.to) + int64_t(column + line) * m.rows + row + first, v);
}

template <class P>
CAST_DEVICE void widen_vector(const Vector& v) {
  for (int i = threadIdx.x; i < v.size; i += PREPARE_THREADS) v.to[i] = to_float(static_cast<const P*>(v.from)[i]);
}

// Eight neighbouring numbers of (beta + position).
template <class P>
CAST_DEVICE void load_input(float (&to)[8], const Table& t, int row, int channel, int channels) {
  load_eight(to, static_cast<const P*>(t.beta) + channel);
  if (t.positions == nullptr) return;
  float position[8];
  load_eight(position, static_cast<const P*>(t.positions) + int64_t(min(row, t.length - 1)) * channels + channel);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] += position[i];
}

// 64 positions x 64 columns, both sides rounded; a warp has 16 x 16. A step's channels are asked for one step ahead.
template <class T, class P>
CAST_DEVICE void make_table(const Table& t, int cta, int channels, unsigned char* room) {
  unsigned char *inputs = room, *weights = room + TILE_BYTES;
  const int across = t.width / SQUARE, first = cta / across * SQUARE, column = cta % across * SQUARE;
  const int line = threadIdx.x / (SQUARE / 8), chunk = threadIdx.x % (SQUARE / 8);  // eight numbers of a step a thread
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = warp % 4 * 16, columns = warp / 4 * 16;
  float acc[2][4] = {};
  uint4 input, weight;  // of the next step
  const auto ask = [&](int channel) {
    if (channel >= channels) return;
    float v[8];
    load_input<P>(v, t, first + line, channel, channels);
    input = pack_eight<T>(v);
    load_eight(v, static_cast<const P*>(t.weight) + int64_t(column + line) * channels + channel);
    weight = pack_eight<T>(v);
  };
  ask(8 * chunk);
  for (int channel = 8 * chunk; channel < channels; channel += SQUARE) {
    __syncthreads();  // all are through with the step before
    *reinterpret_cast<uint4*>(inputs + swizzled(line, chunk)) = input;
    *reinterpret_cast<uint4*>(weights + swizzled(line, chunk)) = weight;
    __syncthreads();
    ask(channel + SQUARE);
    uint32_t a[SQUARE / 4];
    left_operand<SQUARE>(a, shared_address(inputs), rows, 0, lane);
    multiply_rows<T, SQUARE>(acc, a, shared_address(weights), columns, 0, lane);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int at = column + columns + 8 * n + 2 * (lane % 4);
    const float low = to_float(static_cast<const P*>(t.bias)[at]),
                high = to_float(static_cast<const P*>(t.bias)[at + 1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + rows + lane / 4 + 8 * r;
      if (row >= t.length) continue;
      T* to = static_cast<T*>(t.to) + int64_t(row) * t.width + at;
      *reinterpret_cast<uint32_t*>(to) = pack<T>(acc[n][2 * r] + low, acc[n][2 * r + 1] + high);
    }
  }
}

template <class T, class P>
CAST_DEVICE void prepare(const PrepareArguments& g) {
  __shared__ __align__(16) unsigned char room[ROOM];
  const int cta = blockIdx.x;
  if (cta < g.vector_cta) {
    int i = g.matrix_count - 1;
    while (cta < g.matrices[i].first_cta) --i;
    const Matrix& m = g.matrices[i];
    if (m.wide) {
      round_matrix<T, float, P>(m, cta - m.first_cta, room);
    } else {
      round_matrix<T, T, P>(m, cta - m.first_cta, room);
    }
  } else if (cta < g.table_cta) {
    widen_vector<P>(g.vectors[cta - g.vector_cta]);
  } else {
    int i = g.table_count - 1;
    while (cta < g.tables[i].first_cta) --i;
    make_table<T, P>(g.tables[i], cta - g.tables[i].first_cta, g.channels, room);
  }
}

}  // namespace

#define CAST_PREPARE(NAME, T, P) \
  extern "C" __global__ void __launch_bounds__(PREPARE_THREADS) NAME(const __grid_constant__ PrepareArguments g) { \
    prepare<T, P>(g); \
  }

CAST_PREPARE(bcast_prepare_bf16_bf16, bf16, bf16)
CAST_PREPARE(bcast_prepare_bf16_fp32, bf16, float)
CAST_PREPARE(bcast_prepare_fp16_fp16, fp16, fp16)
CAST_PREPARE(bcast_prepare_fp16_fp32, fp16, float)

}  // namespace cast::cuda
