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
constexpr int TABLE_ROWS = 8, TABLE_COLUMNS = 64;      // four groups of threads have a share of W's rows each
constexpr int TABLE_GROUPS = FINISH_THREADS / TABLE_COLUMNS;
constexpr int POSITIONS = FINISH_THREADS / WEIGHT_ROWS;  // whose sums are brought at a time
constexpr int NORM_COLUMNS = 8, NORM_ROWS = FINISH_THREADS / NORM_COLUMNS;
constexpr int AT_ONCE = 16;  // loads that a thread asks for before it waits: nothing else hides their latency

// Where the parts of one pair of tiles lie: of clusters `first` to `last`, from place `slot + first` on.
struct PairParts {
  int first, last, slot;

  CAST_DEVICE PairParts(const FinishArguments& g, const Parts& parts, int pair) : slot(parts.first_pair + pair) {
    const int64_t begin = parts.first_step + int64_t(pair) * parts.steps;
    first = owner(g, begin);
    last = owner(g, begin + parts.steps - 1);
  }

  // Elements [row + i STEP, column] of the pair's part of all parts [places, 256, width], as far as `rows` goes: to each
  // its parts in their order.
  template <int COUNT, int STEP>
  CAST_DEVICE void add(float (&to)[COUNT], const float* all, int width, int row, int rows, int column) const {
    for (int c = first; c <= last; ++c) {
      const float* from = all + (int64_t(slot + c) * PAIR_ROWS + row) * width + column;
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        if (row + i * STEP < rows) to[i] += from[i * STEP * width];
    }
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

// to += factor * by, four of them.
CAST_DEVICE void add_four(float* to, const float4& by, float factor) {
  to[0] = fmaf(by.x, factor, to[0]);
  to[1] = fmaf(by.y, factor, to[1]);
  to[2] = fmaf(by.z, factor, to[2]);
  to[3] = fmaf(by.w, factor, to[3]);
}

template <class P>
CAST_DEVICE void finish_weight(const FinishArguments& g, const WeightOut& w, int cta) {
  constexpr int OWN = WEIGHT_ROWS / 2;
  __shared__ float sums[WEIGHT_ROWS];
  __shared__ float4 positions[POSITIONS][2][OWN / 4];  // a thread's rows side by side
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
  // A CTA's rows and a thread's column lie in one pair.
  const PairParts parts(g, w.parts, column / g.channels * w.parts.m_pairs + row / PAIR_ROWS);
  float v[OWN] = {};
  const bool inside = column < w.n;
  const float gamma = inside && w.norm != nullptr ? w.norm[column] : 1.f;
  const float beta = inside && w.norm != nullptr ? w.norm_bias[column] : 0.f;
  const int first_row = row % PAIR_ROWS;
  if (inside) parts.add<OWN, 2>(v, g.parts, g.channels, first_row + half, first_row + w.m - row, column % g.channels);
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    v[i] *= gamma;
    if (w.norm != nullptr && row + 2 * i + half < w.m) v[i] = fmaf(sums[2 * i + half], beta, v[i]);
  }
  for (int first = 0; w.positions != nullptr && first < w.length; first += POSITIONS) {
    float e[POSITIONS];
    const P* from = static_cast<const P*>(w.positions) + first * w.n + column;
    const int left = inside ? w.length - first : 0;
#pragma unroll
    for (int p = 0; p < POSITIONS; ++p) e[p] = p < left ? to_float(from[p * w.n]) : 0.f;
    const int brought = threadIdx.x / WEIGHT_ROWS, line = threadIdx.x % WEIGHT_ROWS;
    const bool there = first + brought < w.length && row + line < w.m;
    reinterpret_cast<float*>(positions[brought][line % 2])[line / 2] =
        there ? position_sum(w.position_sums, w.splits, w.length, w.m, first + brought, row + line) : 0.f;
    __syncthreads();
#pragma unroll
    for (int p = 0; p < POSITIONS; ++p)
#pragma unroll
      for (int i = 0; i < OWN / 4; ++i) add_four(v + 4 * i, positions[p][half][i], e[p]);
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
  __shared__ float4 sums[MOST][TABLE_ROWS / 4];  // a column's positions side by side
  const int across = (t.n + TABLE_COLUMNS - 1) / TABLE_COLUMNS;
  const int first = cta / across * TABLE_ROWS, column = cta % across * TABLE_COLUMNS + threadIdx.x % TABLE_COLUMNS;
  const int there = min(TABLE_ROWS, t.length - first);
  for (int k = threadIdx.x; k < t.m; k += FINISH_THREADS) {
    float sum[TABLE_ROWS] = {};
    const float* from = t.sums + first * t.m + k;
    for (int s = 0; s < t.splits; ++s, from += t.length * t.m)
#pragma unroll
      for (int i = 0; i < TABLE_ROWS; ++i)
        if (i < there) sum[i] += from[i * t.m];
#pragma unroll
    for (int i = 0; i < TABLE_ROWS / 4; ++i)
      sums[k][i] = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
  }
  __syncthreads();
  const int group = threadIdx.x / TABLE_COLUMNS, share = t.m / TABLE_GROUPS;  // n and m are multiples of 64
  float v[TABLE_ROWS] = {};
  for (int k = group * share; k < (group + 1) * share; k += AT_ONCE) {
    float weight[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      weight[i] = to_float(static_cast<const P*>(t.weight)[int64_t(k + i) * t.n + column]);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
      for (int four = 0; four < TABLE_ROWS / 4; ++four) add_four(v + 4 * four, sums[k + i][four], weight[i]);
  }
  __syncthreads();  // the sums have been read: their place takes the groups' shares
  float (*shares)[TABLE_ROWS][TABLE_COLUMNS] = reinterpret_cast<float (*)[TABLE_ROWS][TABLE_COLUMNS]>(sums);
#pragma unroll
  for (int row = 0; row < TABLE_ROWS; ++row) shares[group][row][threadIdx.x % TABLE_COLUMNS] = v[row];
  __syncthreads();
  for (int row = group; row < there; row += TABLE_GROUPS) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < TABLE_GROUPS; ++i) sum += shares[i][row][threadIdx.x % TABLE_COLUMNS];
    static_cast<P*>(t.to)[int64_t(first + row) * t.n + column] = rounded<P>(sum);
  }
}

template <class T, class P>
CAST_DEVICE void finish_norm(const FinishArguments& g, const NormOut& o, int cta) {
  constexpr int OWN = PAIR_ROWS / NORM_ROWS;
  __shared__ float gammas[NORM_ROWS][NORM_COLUMNS], betas[NORM_ROWS][NORM_COLUMNS];
  const int line = threadIdx.x / NORM_COLUMNS, lane = threadIdx.x % NORM_COLUMNS, column = cta * NORM_COLUMNS + lane;
  float gamma = 0.f, beta = 0.f;
  for (int role = 0; role < 2; ++role) {
    if (o.weights[role] == nullptr) continue;
    for (int pair = 0; pair * PAIR_ROWS < o.m[role]; ++pair) {
      const PairParts parts(g, o.parts[role], pair);
      const int rows = min(PAIR_ROWS, o.m[role] - pair * PAIR_ROWS);
      float product[OWN] = {}, sum[OWN] = {};
      parts.add<OWN, NORM_ROWS>(product, g.parts, g.channels, line, rows, column);
      parts.add<OWN, NORM_ROWS>(sum, g.sums, 1, line, rows, 0);
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        const int64_t at = int64_t(pair * PAIR_ROWS + line + i * NORM_ROWS) * o.n + column;
        const float weight = line + i * NORM_ROWS < rows ? to_float(static_cast<const P*>(o.weights[role])[at]) : 0.f;
        gamma = fmaf(weight, product[i], gamma);
        beta = fmaf(weight, sum[i], beta);
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
  extern "C" __global__ void __launch_bounds__(FINISH_THREADS, 3) NAME(const __grid_constant__ FinishArguments g) { \
    finish<T, P>(g); \
  }

CAST_FINISH(bcast_finish_bf16_bf16, bf16, bf16)
CAST_FINISH(bcast_finish_bf16_fp32, bf16, float)
CAST_FINISH(bcast_finish_fp16_fp16, fp16, fp16)
CAST_FINISH(bcast_finish_fp16_fp32, fp16, float)

}  // namespace cast::cuda
