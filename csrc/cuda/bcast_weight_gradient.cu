// Kernel `weight_gradient`: left' right for all ten matrices, over all rows, and the column sums of left.
//
// All products stand in one line of steps of 64 rows, and every cluster of two CTAs takes an equal share of it, so that
// no multiprocessor waits for another (stream-K). Where a share ends inside of a product, its sum is left in parts,
// which `finish` adds in their order: no atomics, the same bits on every run of the same GPU.
//
// A cluster makes 256 x d: each CTA 128 x d by two warpgroups, from its own columns of left and from tiles of right of
// which each CTA loads half for both. Both operands lie in memory with their rows along k.
#include "bcast_arguments.h"
#include "ring.cuh"
#include "tile.cuh"
#include "wgmma.cuh"

namespace cast::cuda {
namespace {

constexpr int PAIR = 2, GRADIENT_THREADS = 384, PLACES = 3, LEFT_TILES = 2, WARPS = 8;

template <int D>
struct alignas(1024) GradientShared {
  unsigned char left[PLACES][LEFT_TILES][TILE_BYTES];
  unsigned char right[PLACES][D / 64][TILE_BYTES];
  ClusterRingBarriers<PLACES, PAIR> ring;
  float sums[WARPS][64];
};

// A stretch of steps of one pair of tiles.
struct Stretch {
  const GradientJob* job;
  int pair, first, end;  // of the job's pairs; steps of the pair

  // The stretch that begins at `step` of the line and ends before `stop`.
  CAST_DEVICE Stretch(const WeightGradientArguments& g, int step, int stop) {
    int number = g.count - 1;
    while (step < g.jobs[number].first_step) --number;
    job = &g.jobs[number];
    pair = (step - job->first_step) / job->steps;
    const int begin = job->first_step + pair * job->steps;
    first = step - begin;
    end = min(job->steps, stop - begin);
  }
};

// What a row counts in column sums.
CAST_DEVICE float row_factor(const GradientJob& job, int row, int frames) {
  if (row >= job.rows || job.factor == ONES) return 1.f;  // rows behind the end are zero
  const int frame = row / job.tokens.frame_rows, token = row % job.tokens.frame_rows;
  if (job.factor == NOT_CLS) return token < job.tokens.cls ? 0.f : 1.f;
  return job.scale[frame / frames * job.scale_of_clip + token * job.scale_of_token];
}

// Add a tile's columns: this thread has eight of them and every 16th row.
template <class T>
CAST_DEVICE void add_columns(float (&sums)[8], uint32_t tile, const GradientJob& job, int row, int thread, int frames) {
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int line = thread / 8 + 16 * i;
    const float factor = row_factor(job, row + line, frames);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float2 v = unpack<T>(load_shared_word(tile + swizzled(line, thread % 8) + 4 * c));
      sums[2 * c] = fmaf(factor, v.x, sums[2 * c]);
      sums[2 * c + 1] = fmaf(factor, v.y, sums[2 * c + 1]);
    }
  }
}

template <class T, int D>
CAST_DEVICE void produce(const WeightGradientArguments& g, GradientShared<D>& shared, int step, int stop,
                         uint32_t rank) {
  constexpr int HALF = (D / 64 + PAIR - 1) / PAIR;  // tiles of right that a CTA brings
  RingCursor<PLACES> at;
  while (step < stop) {
    const Stretch own(g, step, stop);
    const int column = own.pair % own.job->m_pairs * PAIR_ROWS + rank * PAIR_ROWS / PAIR;
    const int right = own.pair / own.job->m_pairs * D;
    for (int i = own.first; i < own.end; ++i) {
      at.wait_empty(shared.ring);
      uint64_t* full = &shared.ring.full[at.place];
      mbarrier_expect(full, (LEFT_TILES + D / 64) * TILE_BYTES);
      for (int t = 0; t < LEFT_TILES; ++t)
        load_tile(shared.left[at.place][t], &own.job->left, full, column + 64 * t, 64 * i);
      for (int t = rank * HALF; t < min(D / 64, static_cast<int>(rank + 1) * HALF); ++t)
        load_tile_multicast(shared.right[at.place][t], &own.job->right, full, right + 64 * t, 64 * i, (1 << PAIR) - 1);
      at.next();
    }
    step += own.end - own.first;
  }
}

template <class T, int D>
CAST_DEVICE void consume(const WeightGradientArguments& g, GradientShared<D>& shared, int step, int stop, uint32_t rank,
                         int group) {
  constexpr int CHUNKS = D / PRODUCT_COLUMNS;
  const int thread = threadIdx.x % 128, warp = thread / 32;
  const Place place(thread);
  RingCursor<PLACES> at;
  auto free_place = [&](int number) {
    __syncwarp();
    if (place.lane == 0) mbarrier_arrive(&shared.ring.read[number]);
  };
  while (step < stop) {
    const Stretch own(g, step, stop);
    const GradientJob& job = *own.job;
    const bool sums_wanted = own.pair < job.m_pairs;
    float acc[CHUNKS][PRODUCT_COLUMNS / 2];
    for (auto& chunk : acc) clear(chunk);
    float sums[8] = {};
    int before = 0;
    for (int i = own.first; i < own.end; ++i) {
      at.wait_full(shared.ring);
      const unsigned char* left = shared.left[at.place][group];
      const uint64_t a = columns_along_k(left, TILE_BYTES);
      products_begin();
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const uint64_t b = columns_along_k(shared.right[at.place][chunk * PRODUCT_COLUMNS / 64], TILE_BYTES);
#pragma unroll
        for (int k = 0; k < 4; ++k) product_of_columns<T>(acc[chunk], a + 128 * k, b + 128 * k);
      }
      products_commit();
      if (sums_wanted) add_columns<T>(sums, shared_address(left), job, 64 * i, thread, g.frames);
      if (i > own.first) {
        products_wait<1>();  // those of the step before: its place is free
        free_place(before);
      }
      before = at.place;
      at.next();
    }
    products_wait<0>();
    free_place(before);
    // To the stretch's own place.
    const int64_t slot = job.first_pair + own.pair + blockIdx.x / PAIR;
    const int first = rank * PAIR_ROWS / PAIR + 64 * group;
    float* to = g.parts + (slot * PAIR_ROWS + first + place.row) * D + place.column;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* v = acc[j / (PRODUCT_COLUMNS / 8)] + j % (PRODUCT_COLUMNS / 8) * 4 + 2 * r;
        *reinterpret_cast<float2*>(to + 8 * r * D + 8 * j) = make_float2(v[0], v[1]);
      }
    if (sums_wanted) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        sums[c] += __shfl_xor_sync(~0u, sums[c], 8);
        sums[c] += __shfl_xor_sync(~0u, sums[c], 16);
        if (place.lane < 8) shared.sums[4 * group + warp][8 * place.lane + c] = sums[c];
      }
      named_barrier(1 + group, 128);
      if (thread < 64) {
        float total = 0.f;
        for (int w = 0; w < 4; ++w) total += shared.sums[4 * group + w][thread];
        g.sums[slot * PAIR_ROWS + first + thread] = total;
      }
      named_barrier(1 + group, 128);
    }
    step += own.end - own.first;
  }
}

template <class T, int D>
CAST_DEVICE void weight_gradient(const WeightGradientArguments& g) {
  extern __shared__ __align__(1024) unsigned char raw[];
  GradientShared<D>& shared = *reinterpret_cast<GradientShared<D>*>(raw);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const uint32_t rank = cluster_rank();
  const int64_t cluster = blockIdx.x / PAIR, clusters = gridDim.x / PAIR;
  const int step = g.steps * cluster / clusters, stop = g.steps * (cluster + 1) / clusters;
  watch(g);
  if (threadIdx.x == 0) {
    shared.ring.init(WARPS);
    fence_mbarrier_init();
  }
  __syncwarp();
  cluster_sync();
  if (group == 0) {
    lower_registers<40>();
    if (threadIdx.x == 0) produce<T, D>(g, shared, step, stop, rank);
    __syncwarp();
    if (threadIdx.x / 32 == 1) forward_reads(shared.ring, stop - step);
  } else {
    raise_registers<232>();
    consume<T, D>(g, shared, step, stop, rank, group - 1);
  }
  cluster_sync();  // no CTA ends while the other may still write into it or arrive at its barriers
}

}  // namespace

#define CAST_WEIGHT_GRADIENT(NAME, T, D) \
  extern "C" __global__ void __cluster_dims__(PAIR, 1, 1) __launch_bounds__(GRADIENT_THREADS, 1) \
      NAME(const __grid_constant__ WeightGradientArguments g) { \
    weight_gradient<T, D>(g); \
  }

CAST_WEIGHT_GRADIENT(bcast_weight_gradient_bf16_384, bf16, 384)
CAST_WEIGHT_GRADIENT(bcast_weight_gradient_bf16_192, bf16, 192)
CAST_WEIGHT_GRADIENT(bcast_weight_gradient_fp16_384, fp16, 384)
CAST_WEIGHT_GRADIENT(bcast_weight_gradient_fp16_192, fp16, 192)

}  // namespace cast::cuda
