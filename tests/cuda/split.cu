// W[64, 128] = G[rows, 64]' X[rows, 128] and b[64] = sums of G's columns, in bf16 with float32 sums: a weight gradient, for
// tests of the PTX emulator. What it has and gemm.cu has not: operands with rows along the contraction (transposed), two
// boxes behind a leading byte offset, one warpgroup that copies and multiplies, a sum over the CTAs of a cluster.
//
// A cluster of two CTAs shares the rows, 64 at a time in turn. The CTA of rank 1 sends its products to the other by
// st.async, which a barrier there counts in bytes; the sums of columns are read from its memory.
#include "instructions.cuh"

constexpr int STEP = 64, ROWS = 64, COLUMNS = 128, BOX = STEP * 128;  // a box: 64 rows of 128 bytes
struct alignas(1024) Shared {
  unsigned char g[2][BOX], x[2][2 * BOX];
  float4 sent[16][128];
  float sums[ROWS];
  uint64_t full[2], got;
};

// ---- one instruction each; more in instructions.cuh ----
__device__ void wait_for(uint64_t* b, uint32_t parity) {
  asm volatile("{ .reg .pred p;\nAGAIN%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
               "@!p bra AGAIN%=; }" ::"r"(place(b)), "r"(parity) : "memory");
}
__device__ uint32_t of_rank(const void* p, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(place(p)), "r"(rank));
  return there;
}
__device__ void send(uint32_t to, const float* v, uint32_t b) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(b) : "memory");
}
__device__ float read_there(uint32_t from) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(from) : "memory");
  return v;
}
// Rows along the contraction, 128 bytes each under the 128-byte swizzle, eight of them 1024 bytes; 16 rows a product.
__device__ uint64_t operand(const void* tile, int k) {
  return (uint64_t(place(tile) & 0x3FFFF) >> 4) + 128 * k | uint64_t(BOX / 16) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}
#define D(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
__device__ void product(float (&d)[64], uint64_t a, uint64_t b, int adds) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
               "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "
               "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, "
               "%57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 1, 1; }"
               : D(0), D(8), D(16), D(24), D(32), D(40), D(48), D(56) : "l"(a), "l"(b), "r"(adds));
}

__device__ void copy(Shared& s, const Map* g, const Map* x, int step) {
  uint64_t* full = &s.full[step / 2 % 2];
  unsigned char* to = s.x[step / 2 % 2];
  expect(full, 3 * BOX);
  load(s.g[step / 2 % 2], g, full, 0, step * STEP);
  load(to, x, full, 0, step * STEP);
  load(to + BOX, x, full, 64, step * STEP);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128, 1)
split(const __grid_constant__ Map map_g, const __grid_constant__ Map map_x, float* __restrict__ w, float* __restrict__ bias,
      const int steps) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int thread = threadIdx.x, rank = blockIdx.x % 2;
  if (thread == 0) {
    make(&s.full[0], 1);
    make(&s.full[1], 1);
    make(&s.got, 1);
    fence_init();
    if (rank == 0) expect(&s.got, sizeof(s.sent));
    if (rank < steps) copy(s, &map_g, &map_x, rank);
  }
  meet_cluster();
  float acc[64] = {}, sum = 0;
  for (int step = rank; step < steps; step += 2) {
    if (thread == 0 && step + 2 < steps) copy(s, &map_g, &map_x, step + 2);
    const int stage = step / 2 % 2;
    wait_for(&s.full[stage], step / 4 % 2);
    products_begin();
#pragma unroll
    for (int k = 0; k < STEP / 16; ++k) product(acc, operand(s.g[stage], k), operand(s.x[stage], k), 1);
    products_commit();
    if (thread < ROWS)
      for (int r = 0; r < STEP; ++r) {
        const uint32_t bits = *reinterpret_cast<const uint16_t*>(s.g[stage] + 128 * r + (2 * thread ^ r % 8 * 16));
        sum += __uint_as_float(bits << 16);
      }
    products_wait();
    __syncthreads();
  }
  if (thread < ROWS) s.sums[thread] = sum;
  if (rank == 1) {
    const uint32_t told = of_rank(&s.got, 0);
    for (int i = 0; i < 16; ++i) send(of_rank(&s.sent[i][thread], 0), acc + 4 * i, told);
  }
  meet_cluster();
  if (rank == 0) {
    wait_for(&s.got, 0);
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (int i = 0; i < 16; ++i) {
      const float4 more = s.sent[i][thread];
      float* at = w + row * COLUMNS + 8 * i + column;
      at[0] = acc[4 * i] + more.x;
      at[1] = acc[4 * i + 1] + more.y;
      at[8 * COLUMNS] = acc[4 * i + 2] + more.z;
      at[8 * COLUMNS + 1] = acc[4 * i + 3] + more.w;
    }
    if (thread < ROWS) bias[thread] = s.sums[thread] + read_there(of_rank(&s.sums[thread], 1));
  }
  meet_cluster();
}
