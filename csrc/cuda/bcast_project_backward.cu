// Kernel `project_backward`: back through the projections, LayerNorm and the down-projection.
//
//     a = (dn) gamma = dQ (Wq diag(gamma)) + dKV (Wkv diag(gamma)), for CLS dh gamma
//     dz = rstd (a - mean(a) - xhat mean(a xhat));  dX = dz Wd + dY
//
// gamma lies in the weights already, as in `project`. The gradients of gamma, beta and the positions need no dn: they
// follow from dQ' xhat and dKV' xhat, see `finish`. xhat passes twice: beside a there is no room for a row of it.
#include "bcast_arguments.h"
#include "residual.cuh"

namespace cast::cuda {
namespace {

// CLS begins with dh gamma, and the products add its rows of dQ and dKV, which are zero.
template <class T, int CHUNKS>
CAST_DEVICE void begin_with_cls(float (&a)[CHUNKS][PRODUCT_COLUMNS / 2], const uint32_t* dh, const float* gamma, int r,
                                const Place& place) {
#pragma unroll
  for (int j = 0; j < CHUNKS * PRODUCT_COLUMNS / 8; ++j) {
    const int column = 8 * j + place.column;
    const float2 v = unpack<T>(dh[column / 2]), factor = *reinterpret_cast<const float2*>(gamma + column);
    float* to = a[j / (PRODUCT_COLUMNS / 8)] + j % (PRODUCT_COLUMNS / 8) * 4 + 2 * r;
    to[0] = v.x * factor.x;
    to[1] = v.y * factor.y;
  }
}

template <class T, class X, int D>
CAST_DEVICE void project_backward(const ProjectBackwardArguments& g) {
  extern __shared__ __align__(1024) unsigned char raw[];
  RowShared<T>& shared = *reinterpret_cast<RowShared<T>*>(raw);
  const Task task(g.streams);
  const ProjectedBackStream& own = task.own;
  const int row = task.row;
  const Columns columns = g.want_x ? task.columns(g.dim) : Columns{0, 0};
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  watch(g);
  if (threadIdx.x == 0) shared.init();
  __syncwarp();
  cluster_sync();
  if (group == 0) {
    lower_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) {
      Producer<T> producer{shared};
      producer.narrow(&own.grad_q, &own.q_weight, row, own.q_channels, D / PRODUCT_COLUMNS);
      producer.narrow(&own.grad_kv, &own.kv_weight, row, own.kv_channels, D / PRODUCT_COLUMNS);
      producer.widen(&own.down, columns, D);
    }
    __syncwarp();
    if (threadIdx.x / 32 == 1)
      forward_reads(shared.weight_ring,
                    narrow_units(own.q_channels + own.kv_channels, D / PRODUCT_COLUMNS) + widen_units(columns, D));
  } else {
    raise_registers<CONSUMER_REGISTERS>();
    using Rows = Consumer<T, T, D>;
    constexpr int PARTS = D / TILE_COLUMNS<T>, PASSES = 2;
    // As a loop the passes leave float32 streams no spill; of 16 bits ptxas 13.0.88 then serialises the products (C7512).
    constexpr int UNROLLED = sizeof(X) == 4 ? 1 : PASSES;
    Rows consumer{shared};
    const Place& place = consumer.place;
    typename Rows::Narrow dz;
    Incoming<Rows> xhat{consumer};
    {
      typename Rows::Wide a;
      for (auto& chunk : a) clear(chunk);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = row + place.row + 8 * r;
        if (own.dh != nullptr && at < own.rows && at % own.tokens.frame_rows == 0)
          begin_with_cls<T>(a, static_cast<const uint32_t*>(own.dh) + int64_t(at) * (D / 2), own.norm, r, place);
      }
      consumer.narrow(a, own.q_channels + own.kv_channels);  // both products, one after the other
      consumer.meet();  // the tiles are free
      if (consumer.thread == 0)
        for (int i = 0; i < TILES; ++i) xhat.ask(&own.xhat, i % PARTS * TILE_COLUMNS<T>, row);
      float rstd[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) rstd[r] = own.rstd[min(row + place.row + 8 * r, own.rows - 1)];
      float mean[2] = {}, along[2] = {};  // of a, and of a xhat
#pragma unroll UNROLLED
      for (int pass = 0; pass < PASSES; ++pass) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const uint32_t tile = xhat.wait();
#pragma unroll
          for (int j = 0; j < TILE_COLUMNS<T> / 8; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int i = part * TILE_COLUMNS<T> / 4 + 2 * j + r;
              float* v = a[i / 48] + 2 * (i % 48);
              const float2 x = load_pair<T>(tile, place, j, r);
              if (pass == 0) {
                mean[r] += v[0] + v[1];
                along[r] = fmaf(v[0], x.x, fmaf(v[1], x.y, along[r]));
              } else {
                v[0] = rstd[r] * fmaf(-x.x, along[r], v[0] - mean[r]);
                v[1] = rstd[r] * fmaf(-x.y, along[r], v[1] - mean[r]);
              }
            }
          consumer.meet();  // all have read the tile
          if (consumer.thread == 0 && xhat.asked < PASSES * PARTS)
            xhat.ask(&own.xhat, xhat.asked % PARTS * TILE_COLUMNS<T>, row);
        }
        if (pass == 0)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            mean[r] = sum_of_row(mean[r]) * (1.f / D);
            along[r] = sum_of_row(along[r]) * (1.f / D);
          }
      }
      consumer.pack_row(dz, a);
    }
    if (task.stores_rows()) consumer.put_row(&own.dz, row, dz);
    if (g.want_x) {
      if (consumer.thread == 0) store_wait_read<0>();
      consumer.meet();
      Residual<Rows, X> residual{xhat, &own.grad_y, &own.grad_x, row, columns, own.received != 0};
      residual.begin();
#pragma unroll 1
      for (int column = columns.first; column < columns.end; column += PRODUCT_COLUMNS) {
        float acc[PRODUCT_COLUMNS / 2];
        clear(acc);
        consumer.widen(acc, dz);
#pragma unroll
        for (int part = 0; part < PRODUCT_COLUMNS / TILE_COLUMNS<X>; ++part) {
          if (column + part * TILE_COLUMNS<X> >= g.dim) break;
          residual.add(column + part * TILE_COLUMNS<X>, [&](int j, int r) {
            const float* v = acc + part * TILE_COLUMNS<X> / 2 + 4 * j + 2 * r;
            return make_float2(v[0], v[1]);
          });
        }
      }
    }
    if (consumer.thread == 0) store_wait<0>();
  }
  cluster_sync();  // no CTA ends while another may still write into it or arrive at its barriers
}

}  // namespace

#define CAST_PROJECT_BACKWARD(NAME, T, X, D) \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 2) \
      NAME(const __grid_constant__ ProjectBackwardArguments g) { \
    project_backward<T, X, D>(g); \
  }

CAST_PROJECT_BACKWARD(bcast_project_backward_bf16_bf16_384, bf16, bf16, 384)
CAST_PROJECT_BACKWARD(bcast_project_backward_bf16_bf16_192, bf16, bf16, 192)
CAST_PROJECT_BACKWARD(bcast_project_backward_bf16_fp32_384, bf16, float, 384)
CAST_PROJECT_BACKWARD(bcast_project_backward_bf16_fp32_192, bf16, float, 192)
CAST_PROJECT_BACKWARD(bcast_project_backward_fp16_fp16_384, fp16, fp16, 384)
CAST_PROJECT_BACKWARD(bcast_project_backward_fp16_fp16_192, fp16, fp16, 192)
CAST_PROJECT_BACKWARD(bcast_project_backward_fp16_fp32_384, fp16, float, 384)
CAST_PROJECT_BACKWARD(bcast_project_backward_fp16_fp32_192, fp16, float, 192)

}  // namespace cast::cuda
