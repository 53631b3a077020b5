// Kernel `prepare`: weights and vectors as the other kernels read them, made anew at every call.
//
//     matrices:  rounded to the compute dtype, and where gamma is given W diag(gamma)
//     vectors:   in float32
//     tables:    (beta + position p) W' + bias in float32, one row for each position of a window, or one for p = 0
//
// CTAs take matrices first, then vectors, then tables. It runs once a call, over 3 MB of weights.
#include "bcast_arguments.h"
#include "numbers.cuh"

namespace cast::cuda {
namespace {

constexpr int PREPARE_THREADS = 256, MATRIX_ELEMENTS = 8 * PREPARE_THREADS;
constexpr int TABLE_ROWS = 8, TABLE_COLUMNS = 128, MOST_CHANNELS = 384;

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

template <class T, class P>
CAST_DEVICE void round_matrix(const Matrix& m, int cta) {
  const int at = cta * MATRIX_ELEMENTS + threadIdx.x * 8;
  if (at >= m.rows * m.columns) return;
  float v[8], gamma[8];
  load_eight(v, static_cast<const P*>(m.from) + at);
  if (m.gamma != nullptr) {
    load_eight(gamma, static_cast<const P*>(m.gamma) + at % m.columns);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= gamma[i];
  }
  *reinterpret_cast<uint4*>(static_cast<T*>(m.to) + at) =
      make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

template <class P>
CAST_DEVICE void widen_vector(const Vector& v) {
  for (int i = threadIdx.x; i < v.size; i += PREPARE_THREADS) v.to[i] = to_float(static_cast<const P*>(v.from)[i]);
}

// TABLE_ROWS positions x TABLE_COLUMNS columns; a thread has one column and every other position.
template <class P>
CAST_DEVICE void make_table(const Table& t, int cta, int channels) {
  __shared__ float rows[TABLE_ROWS][MOST_CHANNELS];
  const int columns = (t.width + TABLE_COLUMNS - 1) / TABLE_COLUMNS;
  const int first = cta / columns * TABLE_ROWS, column = cta % columns * TABLE_COLUMNS + threadIdx.x % TABLE_COLUMNS;
  for (int i = threadIdx.x; i < TABLE_ROWS * channels; i += PREPARE_THREADS) {
    const int row = i / channels, k = i % channels;
    float v = to_float(static_cast<const P*>(t.beta)[k]);
    if (t.positions != nullptr && first + row < t.length)
      v += to_float(static_cast<const P*>(t.positions)[int64_t(first + row) * channels + k]);
    rows[row][k] = v;
  }
  __syncthreads();
  if (column >= t.width) return;
  float sums[TABLE_ROWS / 2] = {};
  const int half = threadIdx.x / TABLE_COLUMNS;
  for (int k = 0; k < channels; k += 8) {
    float weight[8];
    load_eight(weight, static_cast<const P*>(t.weight) + int64_t(column) * channels + k);
#pragma unroll
    for (int i = 0; i < TABLE_ROWS / 2; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[i] = fmaf(rows[2 * i + half][k + e], weight[e], sums[i]);
  }
  const float bias = to_float(static_cast<const P*>(t.bias)[column]);
#pragma unroll
  for (int i = 0; i < TABLE_ROWS / 2; ++i) {
    const int row = first + 2 * i + half;
    if (row < t.length) t.to[int64_t(row) * t.width + column] = sums[i] + bias;
  }
}

template <class T, class P>
CAST_DEVICE void prepare(const PrepareArguments& g) {
  const int cta = blockIdx.x;
  if (cta < g.vector_cta) {
    int i = g.matrix_count - 1;
    while (cta < g.matrices[i].first_cta) --i;
    round_matrix<T, P>(g.matrices[i], cta - g.matrices[i].first_cta);
  } else if (cta < g.table_cta) {
    widen_vector<P>(g.vectors[cta - g.vector_cta]);
  } else {
    int i = g.table_count - 1;
    while (cta < g.tables[i].first_cta) --i;
    make_table<P>(g.tables[i], cta - g.tables[i].first_cta, g.channels);
  }
}

}  // namespace

#define CAST_PREPARE(NAME, T, P)                                                  \
  extern "C" __global__ void __launch_bounds__(PREPARE_THREADS)                   \
      NAME(const __grid_constant__ PrepareArguments g) {                          \
    prepare<T, P>(g);                                                             \
  }

CAST_PREPARE(bcast_prepare_bf16_bf16, bf16, bf16)
CAST_PREPARE(bcast_prepare_bf16_fp32, bf16, float)
CAST_PREPARE(bcast_prepare_fp16_fp16, fp16, fp16)
CAST_PREPARE(bcast_prepare_fp16_fp32, fp16, float)

}  // namespace cast::cuda
