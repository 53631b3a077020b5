// Kernel `exchange`: output projection, GELU, up-projection and residual of the streams that ask.
//
//     h = O Wo' + b, for CLS LayerNorm's output;  y = x + f (gelu(h) Wu' + b), f the factor of drop-path.
//
// For a backward that has not kept h it makes h alone.
//
// h is rounded before GELU, so that backward finds the same h whether it was kept or is computed again. The residual
// goes through shared memory in place: a tile of x is copied in, the branch added, and the tile copied out as y.
#include "bcast_arguments.h"
#include "activation.cuh"
#include "residual.cuh"

namespace cast::cuda {
namespace {

template <class T, class X, int D>
CAST_DEVICE void exchange(const ExchangeArguments& g) {
  extern __shared__ __align__(1024) unsigned char raw[];
  RowShared<T>& shared = *reinterpret_cast<RowShared<T>*>(raw);
  const Task task(g.streams);
  const AskingStream& own = task.own;
  const int row = task.row;
  const Columns columns = g.only_h ? Columns{0, 0} : task.columns(g.dim);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  watch(g);
  if (threadIdx.x == 0) shared.init();
  __syncwarp();
  cluster_sync();
  if (group == 0) {
    lower_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) {
      Producer<T> producer{shared};
      producer.narrow(&own.o, &own.proj, row, D, D / PRODUCT_COLUMNS);
      producer.widen(&own.up, columns, D);
    }
    __syncwarp();
    if (threadIdx.x / 32 == 1)
      forward_reads(shared.weight_ring, narrow_units(D, D / PRODUCT_COLUMNS) + widen_units(columns, D));
  } else {
    raise_registers<CONSUMER_REGISTERS>();
    Consumer<T, T, D> consumer{shared};
    const Place& place = consumer.place;
    typename Consumer<T, T, D>::Narrow gate;  // h, then gelu(h)
    const int mine = row + place.row;         // and the eighth after it
    {
      typename Consumer<T, T, D>::Wide h;
      consumer.begin_with(h, own.proj_bias);
      consumer.narrow(h, D);
      consumer.pack_row(gate, h);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = mine + 8 * r;
      if (own.tokens.cls == 0 || at >= own.rows || at % own.tokens.frame_rows != 0) continue;
      const uint32_t* xhat = static_cast<const uint32_t*>(own.xhat) + int64_t(at) * (D / 2);
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        const int column = 8 * j + place.column;
        const float2 n = unpack<T>(xhat[column / 2]);
        const float2 gamma = *reinterpret_cast<const float2*>(own.norm + column);
        const float2 beta = *reinterpret_cast<const float2*>(own.norm_bias + column);
        gate[2 * j + r] = pack<T>(fmaf(n.x, gamma.x, beta.x), fmaf(n.y, gamma.y, beta.y));
      }
    }
    if (g.keep_h && task.stores_rows()) {
      consumer.put_row(&own.h, row, gate);
      if (consumer.thread == 0) store_wait_read<0>();
    }
    consumer.meet();  // O and h have left the tiles
    Residual<Consumer<T, T, D>, X> residual{{consumer}, &own.x, &own.y, row, columns};
    residual.begin();
#pragma unroll
    for (int i = 0; i < D / 4; ++i) gate[i] = gelu_pair<T>(gate[i]);
    float factor[2];
    drop_path(factor, own, g.frames, mine);
#pragma unroll 1
    for (int column = columns.first; column < columns.end; column += PRODUCT_COLUMNS) {
      float acc[PRODUCT_COLUMNS / 2];
#pragma unroll
      for (int j = 0; j < PRODUCT_COLUMNS / 8; ++j) {
        const int at = min(column + 8 * j + place.column, g.dim - 2);  // columns behind the end are not stored
        const float2 bias = *reinterpret_cast<const float2*>(own.up_bias + at);
        acc[4 * j] = acc[4 * j + 2] = bias.x;
        acc[4 * j + 1] = acc[4 * j + 3] = bias.y;
      }
      consumer.widen(acc, gate);
#pragma unroll
      for (int part = 0; part < PRODUCT_COLUMNS / TILE_COLUMNS<X>; ++part) {
        if (column + part * TILE_COLUMNS<X> >= g.dim) break;
        residual.add(column + part * TILE_COLUMNS<X>, [&](int j, int r) {
          const float* v = acc + part * TILE_COLUMNS<X> / 2 + 4 * j + 2 * r;
          return make_float2(factor[r] * v[0], factor[r] * v[1]);
        });
      }
    }
    if (consumer.thread == 0) store_wait<0>();
  }
  cluster_sync();  // no CTA ends while another may still write into it or arrive at its barriers
}

}  // namespace

#define CAST_EXCHANGE(NAME, T, X, D) \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 2) \
      NAME(const __grid_constant__ ExchangeArguments g) { \
    exchange<T, X, D>(g); \
  }

CAST_EXCHANGE(bcast_exchange_bf16_bf16_384, bf16, bf16, 384)
CAST_EXCHANGE(bcast_exchange_bf16_bf16_192, bf16, bf16, 192)
CAST_EXCHANGE(bcast_exchange_bf16_fp32_384, bf16, float, 384)
CAST_EXCHANGE(bcast_exchange_bf16_fp32_192, bf16, float, 192)
CAST_EXCHANGE(bcast_exchange_fp16_fp16_384, fp16, fp16, 384)
CAST_EXCHANGE(bcast_exchange_fp16_fp16_192, fp16, fp16, 192)
CAST_EXCHANGE(bcast_exchange_fp16_fp32_384, fp16, float, 384)
CAST_EXCHANGE(bcast_exchange_fp16_fp32_192, fp16, float, 192)

}  // namespace cast::cuda
