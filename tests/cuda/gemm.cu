// C[M, N] = A[M, K] B[N, K]' + bias in bf16, for tests of the PTX emulator: what a Hopper kernel is made of, in small.
//
// Clusters of two CTAs along M share B: each loads half of a tile and multicasts it. Warpgroup 0 has one thread that
// issues copies into a ring of STAGES; warpgroups 1 and 2 multiply 64 rows each and store through shared memory. A CTA
// takes tile after tile, so that the ring and the output buffer are used again.
#include <cuda_bf16.h>

#include "instructions.cuh"

constexpr int BM = 128, BN = 64, BK = 64, STAGES = 3, CLUSTER = 2;
constexpr uint32_t A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, LINE = 128;
struct Sizes { int m, n, k; };
struct alignas(1024) Shared {
  unsigned char a[STAGES][A_BYTES], b[STAGES][B_BYTES], c[BM * BN * 2];
  uint64_t full[STAGES], empty[STAGES];
};

// ---- one instruction each; more in instructions.cuh ----
__device__ void arrive_at(uint64_t* b, uint32_t rank) {
  asm volatile("{ .reg .b32 peer; mapa.shared::cluster.u32 peer, %0, %1;\n"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [peer]; }" ::"r"(place(b)), "r"(rank) : "memory");
}
__device__ bool passed(uint64_t* b, uint32_t parity) {
  uint32_t yes;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
               "selp.u32 %0, 1, 0, p; }" : "=r"(yes) : "r"(place(b)), "r"(parity) : "memory");
  return yes;
}
__device__ void wait_for(uint64_t* b, uint32_t parity) { while (!passed(b, parity)) {} }
__device__ void load_for_all(void* to, const Map* map, uint64_t* b, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(place(to)), "l"(map), "r"(place(b)), "r"(x), "r"(y),
               "h"(static_cast<uint16_t>((1 << CLUSTER) - 1)) : "memory");
}
__device__ void store(const Map* map, const void* from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(map), "r"(place(from)), "r"(x), "r"(y) : "memory");
}
__device__ void commit_store() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ void wait_until_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ void wait_until_stored() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ void fence_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ void meet_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory"); }
__device__ uint32_t rank_in_cluster() { uint32_t r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
template <int N> __device__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
__device__ void store_matrices(void* to, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(place(to)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
// Rows of 128 bytes under the 128-byte swizzle, eight of them 1024 bytes.
__device__ uint64_t operand(const void* tile, int k) {
  return (uint64_t(place(tile) & 0x3FFFF) >> 4) + 2 * k | uint64_t(1) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}
#define D(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
__device__ void product(float (&d)[32], uint64_t a, uint64_t b, int adds) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
               "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
               "%32, %33, p, 1, 1, 0, 0; }"
               : D(0), D(4), D(8), D(12), D(16), D(20), D(24), D(28) : "l"(a), "l"(b), "r"(adds));
}

struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  }
};

__device__ void produce(Shared& s, const Map* a, const Map* b, Sizes sizes, uint32_t rank, int steps, int columns, int tiles) {
  Ring ring;
  for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += gridDim.x / CLUSTER) {
    const int row = (tile / columns * CLUSTER + rank) * BM, column = tile % columns * BN + rank * (BN / CLUSTER);
    for (int step = 0; step < steps; ++step) {
      wait_for(&s.empty[ring.stage], ring.parity ^ 1);
      expect(&s.full[ring.stage], A_BYTES + B_BYTES);
      load(s.a[ring.stage], a, &s.full[ring.stage], step * BK, row);
      load_for_all(s.b[ring.stage] + rank * (B_BYTES / CLUSTER), b, &s.full[ring.stage], step * BK, column);
      ring.next();
    }
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
gemm(const __grid_constant__ Map map_a, const __grid_constant__ Map map_b, const __grid_constant__ Map map_c,
     const float* __restrict__ bias, const Sizes sizes) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  const uint32_t rank = rank_in_cluster();
  const int steps = (sizes.k + BK - 1) / BK, columns = (sizes.n + BN - 1) / BN;
  const int tiles = (sizes.m + BM * CLUSTER - 1) / (BM * CLUSTER) * columns;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) { make(&s.full[i], 1); make(&s.empty[i], 2 * CLUSTER); }
    fence_init();
  }
  __syncwarp();
  meet_cluster();
  if (group == 0) {
    fewer_registers<40>();
    if (thread == 0) produce(s, &map_a, &map_b, sizes, rank, steps, columns, tiles);
    __syncwarp();
  } else {
    more_registers<232>();
    Ring ring;
    unsigned char* out = s.c + (group - 1) * 64 * LINE;
    for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += gridDim.x / CLUSTER) {
      const int row = (tile / columns * CLUSTER + rank) * BM + 64 * (group - 1), column = tile % columns * BN;
      float acc[32];
      for (int step = 0; step < steps; ++step) {
        wait_for(&s.full[ring.stage], ring.parity);
        products_begin();
#pragma unroll
        for (int k = 0; k < BK / 16; ++k)
          product(acc, operand(s.a[ring.stage] + (group - 1) * 64 * LINE, k), operand(s.b[ring.stage], k), step | k);
        products_commit();
        products_wait();
        if (thread < CLUSTER) arrive_at(&s.empty[ring.stage], thread);
        ring.next();
      }
      if (thread == 0) wait_until_read();
      meet_group(group);
      const int lane = thread % 32, line = 16 * (thread / 32) + lane % 16;
#pragma unroll
      for (int j = 0; j < BN / 16; ++j) {
        uint32_t packed[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int c = column + 16 * j + 8 * (q / 2) + 2 * (lane % 4);
          const float first = c < sizes.n ? bias[c] : 0.f, second = c + 1 < sizes.n ? bias[c + 1] : 0.f;
          const __nv_bfloat162 two = __floats2bfloat162_rn(acc[8 * j + 2 * q] + first, acc[8 * j + 2 * q + 1] + second);
          packed[q] = reinterpret_cast<const uint32_t&>(two);
        }
        store_matrices(out + line * LINE + 16 * ((2 * j + lane / 16) ^ (line % 8)), packed);
      }
      fence_for_copies();
      meet_group(group);
      if (thread == 0) { store(&map_c, out, column, row); commit_store(); }
    }
    if (thread == 0) wait_until_stored();
    __syncwarp();
  }
  meet_cluster();
}
