// Kernel `finish`: the parameters' gradients from what the kernels before left in parts.
//
// With G = dQ' xhat, c = sums of dQ over rows, and S[p] = sums of dQ over the rows at position p:
//
//     dWq = G diag(gamma) + c beta' + S' E       E: the position table
//     dE  = S Wq
//     dgamma = column sums of Wq o G, dbeta = c' Wq, of keys and values as well, and of CLS dh o xhat and dh
//
// so neither LayerNorm's output nor its gradient is ever in memory. Every other weight's gradient is the sum of its
// parts. CTAs take weights first, then tables, then norms; each element has one owner, and sums run in a fixed order.
#include "bcast_arguments.h"
#include "numbers.cuh"

namespace cast::cuda {
namespace {

constexpr int FINISH_THREADS = 256;
constexpr int WEIGHT_ROWS = 16, WEIGHT_COLUMNS = 128;  // of a CTA: a thread has eight rows of a column
constexpr int TABLE_ROWS = 8, TABLE_COLUMNS = 128;     // a thread has four rows of a column
constexpr int POSITIONS = FINISH_THREADS / WEIGHT_ROWS;  // whose sums are brought at a time
constexpr int NORM_COLUMNS = 32, NORM_ROWS = FINISH_THREADS / NORM_COLUMNS;

template <class P>
CAST_DEVICE P rounded(float x);
template <>
CAST_DEVICE float rounded<float>(float x) {
  return x;
}
template <>
CAST_DEVICE bf16 rounded<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
CAST_DEVICE fp16 rounded<fp16>(float x) {
  return __float2half_rn(x);
}

// Where the parts of one pair of tiles lie: of clusters `first` to `last`, from place `slot + first` on.
struct PairParts {
  int first, last, slot;

  CAST_DEVICE PairParts(const FinishArguments& g, const Parts& parts, int pair) : slot(parts.first_pair + pair) {
    const int64_t begin = parts.first_step + int64_t(pair) * parts.steps;
    first = owner(g, begin);
    last = owner(g, begin + parts.steps - 1);
  }

  // Element [row, column] of the pair's d columns, its parts added in their order.
  CAST_DEVICE float product(const FinishArguments& g, int row, int column) const {
    float sum = 0.f;
    for (int c = first; c <= last; ++c) sum += g.parts[(int64_t(slot + c) * PAIR_ROWS + row) * g.channels + column];
    return sum;
  }
  // The sum of left's column `row` of the pair.
  CAST_DEVICE float sum(const FinishArguments& g, int row) const {
    float sum = 0.f;
    for (int c = first; c <= last; ++c) sum += g.sums[int64_t(slot + c) * PAIR_ROWS + row];
    return sum;
  }

 private:
  // The cluster c with all * c / clusters <= step < all * (c + 1) / clusters, divisions rounded down.
  CAST_DEVICE static int owner(const FinishArguments& g, int64_t step) {
    return static_cast<int>(((step + 1) * g.clusters - 1) / g.steps);
  }
};

// S[p, column], its splits added.
CAST_DEVICE float position_sum(const float* sums, int splits, int length, int width, int p, int column) {
  float sum = 0.f;
  for (int s = 0; s < splits; ++s) sum += sums[(int64_t(s) * length + p) * width + column];
  return sum;
}

template <class P>
CAST_DEVICE void finish_weight(const FinishArguments& g, const WeightOut& w, int cta) {
  __shared__ float sums[WEIGHT_ROWS], positions[POSITIONS][WEIGHT_ROWS];
  const int across = (w.n + WEIGHT_COLUMNS - 1) / WEIGHT_COLUMNS;
  const int row = cta / across * WEIGHT_ROWS, column = cta % across * WEIGHT_COLUMNS + threadIdx.x % WEIGHT_COLUMNS;
  const int half = threadIdx.x / WEIGHT_COLUMNS;
  if (threadIdx.x < WEIGHT_ROWS && row + threadIdx.x < w.m && (w.bias != nullptr || w.norm != nullptr)) {
    sums[threadIdx.x] = PairParts(g, w.parts, row / PAIR_ROWS).sum(g, row % PAIR_ROWS + threadIdx.x);
    if (w.bias != nullptr && cta % across == 0)
      static_cast<P*>(w.bias)[row + threadIdx.x] = rounded<P>(sums[threadIdx.x]);
  }
  __syncthreads();
  if (w.weight == nullptr) return;
  constexpr int OWN = WEIGHT_ROWS / 2;
  // A CTA's rows and a thread's column lie in one pair.
  const PairParts parts(g, w.parts, column / g.channels * w.parts.m_pairs + row / PAIR_ROWS);
  float v[OWN];
  const bool inside = column < w.n;
  const float gamma = inside && w.norm != nullptr ? w.norm[column] : 1.f;
  const float beta = inside && w.norm != nullptr ? w.norm_bias[column] : 0.f;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int at = row + 2 * i + half;
    v[i] = inside && at < w.m ? parts.product(g, at % PAIR_ROWS, column % g.channels) * gamma : 0.f;
    if (w.norm != nullptr && at < w.m) v[i] = fmaf(sums[2 * i + half], beta, v[i]);
  }
  for (int first = 0; w.positions != nullptr && first < w.length; first += POSITIONS) {
    const int brought = threadIdx.x / WEIGHT_ROWS, line = threadIdx.x % WEIGHT_ROWS;
    const bool there = first + brought < w.length && row + line < w.m;
    positions[brought][line] =
        there ? position_sum(w.position_sums, w.splits, w.length, w.m, first + brought, row + line) : 0.f;
    __syncthreads();
    for (int p = 0; p < min(POSITIONS, w.length - first); ++p) {
      const float e = inside ? to_float(static_cast<const P*>(w.positions)[int64_t(first + p) * w.n + column]) : 0.f;
#pragma unroll
      for (int i = 0; i < OWN; ++i) v[i] = fmaf(positions[p][2 * i + half], e, v[i]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int at = row + 2 * i + half;
    if (inside && at < w.m) static_cast<P*>(w.weight)[int64_t(at) * w.n + column] = rounded<P>(v[i]);
  }
}

template <class P>
CAST_DEVICE void finish_table(const TableOut& t, int cta) {
  constexpr int MOST = 768;  // 2 d
  __shared__ float sums[TABLE_ROWS][MOST];
  const int across = (t.n + TABLE_COLUMNS - 1) / TABLE_COLUMNS;
  const int first = cta / across * TABLE_ROWS, column = cta % across * TABLE_COLUMNS + threadIdx.x % TABLE_COLUMNS;
  for (int i = threadIdx.x; i < TABLE_ROWS * t.m; i += FINISH_THREADS) {
    const int p = first + i / t.m;
    sums[i / t.m][i % t.m] = p < t.length ? position_sum(t.sums, t.splits, t.length, t.m, p, i % t.m) : 0.f;
  }
  __syncthreads();
  if (column >= t.n) return;
  const int half = threadIdx.x / TABLE_COLUMNS;
  float v[TABLE_ROWS / 2] = {};
  for (int k = 0; k < t.m; ++k) {
    const float weight = to_float(static_cast<const P*>(t.weight)[int64_t(k) * t.n + column]);
#pragma unroll
    for (int i = 0; i < TABLE_ROWS / 2; ++i) v[i] = fmaf(sums[2 * i + half][k], weight, v[i]);
  }
#pragma unroll
  for (int i = 0; i < TABLE_ROWS / 2; ++i) {
    const int p = first + 2 * i + half;
    if (p < t.length) static_cast<P*>(t.to)[int64_t(p) * t.n + column] = rounded<P>(v[i]);
  }
}

template <class T, class P>
CAST_DEVICE void finish_norm(const FinishArguments& g, const NormOut& o, int cta) {
  __shared__ float gammas[NORM_ROWS][NORM_COLUMNS], betas[NORM_ROWS][NORM_COLUMNS];
  const int line = threadIdx.x / NORM_COLUMNS, lane = threadIdx.x % NORM_COLUMNS, column = cta * NORM_COLUMNS + lane;
  float gamma = 0.f, beta = 0.f;
  for (int role = 0; role < 2; ++role) {
    if (o.weights[role] == nullptr) continue;
    for (int pair = 0; pair * PAIR_ROWS < o.m[role]; ++pair) {
      const PairParts parts(g, o.parts[role], pair);
      for (int row = line; row < min(PAIR_ROWS, o.m[role] - pair * PAIR_ROWS); row += NORM_ROWS) {
        const int64_t at = int64_t(pair * PAIR_ROWS + row) * o.n + column;
        const float weight = to_float(static_cast<const P*>(o.weights[role])[at]);
        gamma = fmaf(weight, parts.product(g, row, column), gamma);
        beta = fmaf(weight, parts.sum(g, row), beta);
      }
    }
  }
  for (int frame = line; o.dh != nullptr && frame < o.all_frames; frame += NORM_ROWS) {
    const int64_t at = int64_t(frame) * o.tokens.frame_rows * o.n + column;
    const float grad = to_float(static_cast<const T*>(o.dh)[at]);
    gamma = fmaf(grad, to_float(static_cast<const T*>(o.xhat)[at]), gamma);
    beta += grad;
  }
  gammas[line][lane] = gamma;
  betas[line][lane] = beta;
  __syncthreads();
  if (line != 0) return;
  gamma = beta = 0.f;
  for (int i = 0; i < NORM_ROWS; ++i) {
    gamma += gammas[i][lane];
    beta += betas[i][lane];
  }
  if (o.norm != nullptr) static_cast<P*>(o.norm)[column] = rounded<P>(gamma);
  if (o.norm_bias != nullptr) static_cast<P*>(o.norm_bias)[column] = rounded<P>(beta);
}

template <class T, class P>
CAST_DEVICE void finish(const FinishArguments& g) {
  const int cta = blockIdx.x;
  if (cta < g.table_cta) {
    int i = g.weight_count - 1;
    while (cta < g.weights[i].first_cta) --i;
    finish_weight<P>(g, g.weights[i], cta - g.weights[i].first_cta);
  } else if (cta < g.norm_cta) {
    int i = g.table_count - 1;
    while (cta < g.tables[i].first_cta) --i;
    finish_table<P>(g.tables[i], cta - g.tables[i].first_cta);
  } else {
    int i = g.norm_count - 1;
    while (cta < g.norms[i].first_cta) --i;
    finish_norm<T, P>(g, g.norms[i], cta - g.norms[i].first_cta);
  }
}

}  // namespace

#define CAST_FINISH(NAME, T, P) \
  extern "C" __global__ void __launch_bounds__(FINISH_THREADS) NAME(const __grid_constant__ FinishArguments g) { \
    finish<T, P>(g); \
  }

CAST_FINISH(bcast_finish_bf16_bf16, bf16, bf16)
CAST_FINISH(bcast_finish_bf16_fp32, bf16, float)
CAST_FINISH(bcast_finish_fp16_fp16, fp16, fp16)
CAST_FINISH(bcast_finish_fp16_fp32, fp16, float)

}  // namespace cast::cuda
