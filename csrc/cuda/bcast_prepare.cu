// Kernel `prepare`: weights and vectors as the other kernels read them, made anew at every call.
//
//     matrices:  rounded to the compute dtype, where gamma is given W diag(gamma), and transposed for backward
//     vectors:   in float32
//     tables:    (beta + position p) W' + bias in float32, one row for each position of a window, or one for p = 0
//
// CTAs take matrices first, then vectors, then tables. It runs once a call, over 2.4 million weights at the paper's size;
// in a backward with float32 streams it rounds these, too.
#include "bcast_arguments.h"
#include "numbers.cuh"

namespace cast::cuda {
namespace {

constexpr int PREPARE_THREADS = 512, SQUARE = 64;
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

template <class T>
CAST_DEVICE void store_eight(T* to, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

// A square of a matrix of From, rounded, through shared memory where it is turned. P: of gamma.
template <class T, class From, class P>
CAST_DEVICE void round_matrix(const Matrix& m, int cta) {
  __shared__ float square[SQUARE][SQUARE + 1];
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

// TABLE_ROWS positions x TABLE_COLUMNS columns; a thread has one column and every fourth position.
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
  constexpr int SHARES = PREPARE_THREADS / TABLE_COLUMNS;
  float sums[TABLE_ROWS / SHARES] = {};
  const int share = threadIdx.x / TABLE_COLUMNS;
  for (int k = 0; k < channels; k += 8) {
    float weight[8];
    load_eight(weight, static_cast<const P*>(t.weight) + int64_t(column) * channels + k);
#pragma unroll
    for (int i = 0; i < TABLE_ROWS / SHARES; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[i] = fmaf(rows[SHARES * i + share][k + e], weight[e], sums[i]);
  }
  const float bias = to_float(static_cast<const P*>(t.bias)[column]);
#pragma unroll
  for (int i = 0; i < TABLE_ROWS / SHARES; ++i) {
    const int row = first + SHARES * i + share;
    if (row < t.length) t.to[int64_t(row) * t.width + column] = sums[i] + bias;
  }
}

template <class T, class P>
CAST_DEVICE void prepare(const PrepareArguments& g) {
  const int cta = blockIdx.x;
  if (cta < g.vector_cta) {
    int i = g.matrix_count - 1;
    while (cta < g.matrices[i].first_cta) --i;
    const Matrix& m = g.matrices[i];
    if (m.wide) {
      round_matrix<T, float, P>(m, cta - m.first_cta);
    } else {
      round_matrix<T, T, P>(m, cta - m.first_cta);
    }
  } else if (cta < g.table_cta) {
    widen_vector<P>(g.vectors[cta - g.vector_cta]);
  } else {
    int i = g.table_count - 1;
    while (cta < g.tables[i].first_cta) --i;
    make_table<P>(g.tables[i], cta - g.tables[i].first_cta, g.channels);
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
