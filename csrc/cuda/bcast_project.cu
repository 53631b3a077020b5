// Kernel `project`: down-projection, LayerNorm, and the queries, keys and values of both ways.
//
//     z = x Wd' + b;  xhat = (z - mean) rstd;  Q = xhat (gamma o Wq)' + table[position], and so K and V,
//     table[p] = (beta + position p) W' + b, which `prepare` has made.
//
// z stays in float32 accumulators and is never rounded; xhat is rounded once, for products, memory and backward alike.
// LayerNorm's weight and bias, and the positions, cost nothing here: the tables are the accumulators' first values.
#include "bcast_arguments.h"
#include "rows.cuh"

namespace cast::cuda {
namespace {

// xhat = (z - mean) rstd of this thread's two rows, as an operand; and rstd.
template <class T, int CHUNKS>
CAST_DEVICE void normalise(const float (&z)[CHUNKS][PRODUCT_COLUMNS / 2], float eps, uint32_t* xhat, float (&rstd)[2]) {
  constexpr float SHARE = 1.f / (CHUNKS * PRODUCT_COLUMNS);
  float mean[2] = {}, square[2] = {};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
    for (int i = 0; i < PRODUCT_COLUMNS / 2; ++i) mean[i / 2 % 2] += z[c][i];
#pragma unroll
  for (int r = 0; r < 2; ++r) mean[r] = sum_of_row(mean[r]) * SHARE;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
    for (int i = 0; i < PRODUCT_COLUMNS / 2; ++i) {
      const float v = z[c][i] - mean[i / 2 % 2];
      square[i / 2 % 2] = fmaf(v, v, square[i / 2 % 2]);
    }
  float shift[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rstd[r] = rsqrtf(fmaf(sum_of_row(square[r]), SHARE, eps));
    shift[r] = -mean[r] * rstd[r];
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
    for (int i = 0; i < PRODUCT_COLUMNS / 4; ++i) {
      const float first = fmaf(z[c][2 * i], rstd[i % 2], shift[i % 2]);
      const float second = fmaf(z[c][2 * i + 1], rstd[i % 2], shift[i % 2]);
      xhat[c * PRODUCT_COLUMNS / 4 + i] = pack<T>(first, second);
    }
}

// Row of a position table for a row of the stream; CLS, which has no position, takes that of patch 0: nobody reads it.
CAST_DEVICE int position(int row, int frames, Tokens tokens, Steps steps) {
  const int frame = row / tokens.frame_rows, patch = row % tokens.frame_rows - tokens.cls;
  return frame % frames * steps.by_frame + max(patch, 0) * steps.by_patch;
}

// out = xhat W' + table[position], these of its `width` columns.
template <class T, class X, int D>
CAST_DEVICE void project_columns(Consumer<T, X, D>& consumer, const typename Consumer<T, X, D>::Narrow& xhat,
                                 const TensorMap* out, const void* table, int width, Columns columns, int row,
                                 const int (&at)[2]) {
#pragma unroll 1
  for (int column = columns.first; column < columns.end; column += PRODUCT_COLUMNS) {
    float acc[PRODUCT_COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < PRODUCT_COLUMNS / 4; ++i) {
      const int from = at[i % 2] * width + column + 8 * (i / 2) + consumer.place.column;
      const float2 first = unpack<T>(static_cast<const uint32_t*>(table)[from / 2]);
      acc[2 * i] = first.x;
      acc[2 * i + 1] = first.y;
    }
    consumer.widen(acc, xhat);
    consumer.put_chunk(out, column, row, acc);
  }
}

// Queries, keys and values from xhat.
template <class T, class X, int D>
CAST_DEVICE void project_roles(Consumer<T, X, D>& consumer, const typename Consumer<T, X, D>::Narrow& xhat,
                               const ProjectedStream& own, Columns q, Columns kv, int frames, int row) {
  int at[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) at[r] = position(row + consumer.place.row + 8 * r, frames, own.tokens, own.q_steps);
  project_columns(consumer, xhat, &own.q, own.q_table, own.q_columns, q, row, at);
#pragma unroll
  for (int r = 0; r < 2; ++r) at[r] = position(row + consumer.place.row + 8 * r, frames, own.tokens, own.kv_steps);
  project_columns(consumer, xhat, &own.kv, own.kv_table, own.kv_columns, kv, row, at);
}

// AGAIN: xhat was kept.
template <class T, class X, int D, bool AGAIN>
CAST_DEVICE void project(const ProjectArguments& g) {
  extern __shared__ __align__(1024) unsigned char raw[];
  RowShared<X>& shared = *reinterpret_cast<RowShared<X>*>(raw);
  const Task task(g.streams);
  const ProjectedStream& own = task.own;
  const int row = task.row;
  const Columns columns = task.columns(own.q_columns + own.kv_columns);
  const Columns q = columns.within(0, own.q_columns), kv = columns.within(own.q_columns, own.kv_columns);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  watch(g);
  if (threadIdx.x == 0) shared.init();
  __syncwarp();
  cluster_sync();
  if (group == 0) {
    lower_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) {
      Producer<X> producer{shared};
      if constexpr (AGAIN) {
        producer.give(&own.xhat, row, D);
      } else {
        producer.narrow(&own.x, &own.down, row, g.dim, D / PRODUCT_COLUMNS);
      }
      producer.widen(&own.q_weight, q, D);
      producer.widen(&own.kv_weight, kv, D);
    }
    __syncwarp();
    if (threadIdx.x / 32 == 1)
      forward_reads(shared.weight_ring,
                    (AGAIN ? 0 : narrow_units(g.dim, D / PRODUCT_COLUMNS)) + widen_units(q, D) + widen_units(kv, D));
  } else {
    raise_registers<CONSUMER_REGISTERS>();
    Consumer<T, X, D> consumer{shared};
    typename Consumer<T, X, D>::Narrow xhat;
    if constexpr (AGAIN) {
      consumer.take(xhat);
    } else {
      typename Consumer<T, X, D>::Wide z;
      consumer.begin_with(z, own.down_bias);
      consumer.narrow(z, g.dim);
      float rstd[2];
      normalise<T>(z, g.eps, xhat, rstd);
      if (task.stores_rows()) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int at = row + consumer.place.row + 8 * r;
          if (consumer.place.lane % 4 == 0 && at < own.rows) own.rstd[at] = rstd[r];
        }
        consumer.put_row(&own.xhat, row, xhat);
      }
    }
    project_roles(consumer, xhat, own, q, kv, g.frames, row);
    if (consumer.thread == 0) store_wait<0>();
  }
  cluster_sync();  // no CTA ends while another may still write into it or arrive at its barriers
}

}  // namespace

#define CAST_PROJECT(NAME, T, X, D, AGAIN) \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 2) \
      NAME(const __grid_constant__ ProjectArguments g) { \
    project<T, X, D, AGAIN>(g); \
  }

CAST_PROJECT(bcast_project_bf16_bf16_384, bf16, bf16, 384, false)
CAST_PROJECT(bcast_project_bf16_bf16_192, bf16, bf16, 192, false)
CAST_PROJECT(bcast_project_bf16_fp32_384, bf16, float, 384, false)
CAST_PROJECT(bcast_project_bf16_fp32_192, bf16, float, 192, false)
CAST_PROJECT(bcast_project_fp16_fp16_384, fp16, fp16, 384, false)
CAST_PROJECT(bcast_project_fp16_fp16_192, fp16, fp16, 192, false)
CAST_PROJECT(bcast_project_fp16_fp32_384, fp16, float, 384, false)
CAST_PROJECT(bcast_project_fp16_fp32_192, fp16, float, 192, false)
CAST_PROJECT(bcast_project_again_bf16_384, bf16, bf16, 384, true)
CAST_PROJECT(bcast_project_again_bf16_192, bf16, bf16, 192, true)
CAST_PROJECT(bcast_project_again_fp16_384, fp16, fp16, 384, true)
CAST_PROJECT(bcast_project_again_fp16_192, fp16, fp16, 192, true)

}  // namespace cast::cuda
