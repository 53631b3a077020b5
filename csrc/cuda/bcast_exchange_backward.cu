// Kernel `exchange_backward`: back through the residual's factor, the up-projection, GELU and the output projection.
//
//     dh = f (dY Wu) gelu'(h);  dO = dh Wo;  g = f gelu(h), which the up-projection's weight gradient reads.
//
// Weights come transposed, so that a row kernel is a row kernel. CLS has no dO: what its rows get, nobody reads.
#include "activation.cuh"
#include "bcast_arguments.h"
#include "rows.cuh"

namespace cast::cuda {
namespace {

template <class T, class X, int D>
CAST_DEVICE void exchange_backward(const ExchangeBackwardArguments& g) {
  extern __shared__ __align__(1024) unsigned char raw[];
  RowShared<X>& shared = *reinterpret_cast<RowShared<X>*>(raw);
  const Task task(g.streams);
  const AskedStream& own = task.own;
  const int row = task.row;
  const Columns columns = task.columns(D);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  watch(g);
  if (threadIdx.x == 0) shared.init();
  __syncwarp();
  cluster_sync();
  if (group == 0) {
    lower_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) {
      Producer<X> producer{shared};
      producer.narrow(&own.grad_y, &own.up, row, g.dim, D / PRODUCT_COLUMNS);
      producer.widen(&own.proj, columns, D);
    }
    __syncwarp();
    if (threadIdx.x / 32 == 1)
      forward_reads(shared.weight_ring, narrow_units(g.dim, D / PRODUCT_COLUMNS) + widen_units(columns, D));
  } else {
    raise_registers<CONSUMER_REGISTERS>();
    using Rows = Consumer<T, X, D>;
    Rows consumer{shared};
    const Place& place = consumer.place;
    typename Rows::Narrow dh;
    {
      typename Rows::Wide dg;
      for (auto& chunk : dg) clear(chunk);
      consumer.narrow(dg, g.dim, sizeof(X) == 4 && task.stores_rows() ? &own.rounded_grad_y : nullptr, row);
      if (consumer.thread == 0) store_wait_read<0>();
      consumer.meet();  // dY has left the tiles
      Incoming<Rows> h{consumer};
      if (consumer.thread == 0)
        for (int i = 0; i < min(TILES - 1, D / TILE_COLUMNS<T>); ++i) h.ask(&own.h, i * TILE_COLUMNS<T>, row);
      float factor[2];
      drop_path(factor, own, g.frames, row + place.row);
#pragma unroll
      for (int part = 0; part < D / TILE_COLUMNS<T>; ++part) {
        const uint32_t tile = h.wait();  // of h, in whose place g goes out
#pragma unroll
        for (int j = 0; j < TILE_COLUMNS<T> / 8; ++j)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int i = part * TILE_COLUMNS<T> / 4 + 2 * j + r;
            float* grad = dg[i / 48] + 2 * (i % 48);
            const float2 v = load_pair<T>(tile, place, j, r);
            grad[0] *= factor[r] * gelu_gradient(v.x);
            grad[1] *= factor[r] * gelu_gradient(v.y);
            store_pair(tile, place, j, r, pack<T>(factor[r] * gelu(v.x), factor[r] * gelu(v.y)));
          }
        fence_proxy_async();
        consumer.meet();
        if (consumer.thread == 0) {
          if (task.stores_rows()) store_tile(&own.g, shared.tiles[part % TILES], part * TILE_COLUMNS<T>, row);
          store_commit();
          store_wait_read<1>();  // the tile before has left
          if (h.asked * TILE_COLUMNS<T> < D) h.ask(&own.h, h.asked * TILE_COLUMNS<T>, row);
        }
      }
      consumer.pack_row(dh, dg);
    }
    if (consumer.thread == 0) store_wait_read<0>();
    consumer.meet();
    if (task.stores_rows()) consumer.put_row(&own.dh, row, dh);
#pragma unroll 1
    for (int column = columns.first; column < columns.end; column += PRODUCT_COLUMNS) {
      float acc[PRODUCT_COLUMNS / 2];
      clear(acc);
      consumer.widen(acc, dh);
      consumer.put_chunk(&own.grad_o, column, row, acc);
    }
    if (consumer.thread == 0) store_wait<0>();
  }
  cluster_sync();  // no CTA ends while another may still write into it or arrive at its barriers
}

}  // namespace

#define CAST_EXCHANGE_BACKWARD(NAME, T, X, D) \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 2) \
      NAME(const __grid_constant__ ExchangeBackwardArguments g) { \
    exchange_backward<T, X, D>(g); \
  }

CAST_EXCHANGE_BACKWARD(bcast_exchange_backward_bf16_bf16_384, bf16, bf16, 384)
CAST_EXCHANGE_BACKWARD(bcast_exchange_backward_bf16_bf16_192, bf16, bf16, 192)
CAST_EXCHANGE_BACKWARD(bcast_exchange_backward_bf16_fp32_384, bf16, float, 384)
CAST_EXCHANGE_BACKWARD(bcast_exchange_backward_bf16_fp32_192, bf16, float, 192)
CAST_EXCHANGE_BACKWARD(bcast_exchange_backward_fp16_fp16_384, fp16, fp16, 384)
CAST_EXCHANGE_BACKWARD(bcast_exchange_backward_fp16_fp16_192, fp16, fp16, 192)
CAST_EXCHANGE_BACKWARD(bcast_exchange_backward_fp16_fp32_384, fp16, float, 384)
CAST_EXCHANGE_BACKWARD(bcast_exchange_backward_fp16_fp32_192, fp16, float, 192)

}  // namespace cast::cuda
