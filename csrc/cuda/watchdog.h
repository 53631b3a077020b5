// Waits for barriers of shared memory, and in a build with CAST_WATCHDOG a limit to them: a wait that takes longer says what
// it waits for, in memory that the host reads, and traps. Plain C++ for the host; functions for nvcc.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include "ptx.cuh"
#define CAST_BOTH_SIDES __host__ __device__
#else
#define CAST_BOTH_SIDES
#endif

namespace cast::cuda {

enum class Awaited : std::uint32_t { full, empty, read, incoming };

#ifdef CAST_WATCHDOG

// A line of a source, whose file's name is hashed: kernels hold no text.
struct Source {
  std::uint32_t file, line;
};
CAST_BOTH_SIDES constexpr std::uint32_t file_number(const char* path) {
  std::uint32_t number = 0;
  for (; *path != 0; ++path) number = *path == '/' ? 0 : 31 * number + *path;
  return number;
}
// As a default argument: where the function is called.
#define CAST_CALLER \
  Source { file_number(__builtin_FILE()), static_cast<std::uint32_t>(__builtin_LINE()) }

// A wait that took too long.
struct LongWait {
  std::uint32_t told;  // 1, written last
  std::uint32_t cta, warp;
  Awaited barrier;
  std::uint32_t place, parity;
  std::uint32_t address;  // of the barrier in shared memory
  Source source;  // where the wait is asked for
};

constexpr int LONG_WAITS = 4096;  // more than warps of a GPU that wait: a warp's number among all picks its own
constexpr std::uint64_t WAIT_NS = 2'000'000'000, TELL_NS = 500'000'000;  // others tell theirs before one traps

// Base of the arguments of kernels that wait.
struct Watched {
  LongWait* waits;
};

#ifdef __CUDACC__

CAST_DEVICE LongWait*& long_waits() {
  __shared__ LongWait* all;
  return all;
}

// Before the cluster meets.
CAST_DEVICE void watch(const Watched& g) {
  if (threadIdx.x == 0) long_waits() = g.waits;
}

CAST_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

CAST_DEVICE void tell(const uint64_t* barrier, uint32_t parity, Awaited what, int place, Source source) {
  const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32;
  volatile LongWait& to = long_waits()[(blockIdx.x * warps + warp) % LONG_WAITS];
  to.cta = blockIdx.x;
  to.warp = warp;
  to.barrier = what;
  to.place = place;
  to.parity = parity;
  to.address = shared_address(barrier);
  to.source.file = source.file;
  to.source.line = source.line;
  __threadfence_system();
  to.told = 1;
  __threadfence_system();
}

template <bool (&try_wait)(uint64_t*, uint32_t)>
CAST_DEVICE void wait_by(uint64_t* barrier, uint32_t parity, Awaited what, int place, Source source) {
  if (try_wait(barrier, parity)) return;
  const uint64_t begin = nanoseconds();
  bool told = false;
  while (!try_wait(barrier, parity)) {
    const uint64_t passed = nanoseconds() - begin;
    if (passed > WAIT_NS && !told) {
      tell(barrier, parity, what, place, source);
      told = true;
    } else if (passed > WAIT_NS + TELL_NS) {
      asm volatile("trap;");
    }
  }
}

// Until the phase of this parity is over; `mbarrier_try_wait` says what is seen then.
CAST_DEVICE void wait(uint64_t* barrier, uint32_t parity, Awaited what, int place, Source source = CAST_CALLER) {
  wait_by<mbarrier_try_wait>(barrier, parity, what, place, source);
}
CAST_DEVICE void wait_cluster(uint64_t* barrier, uint32_t parity, Awaited what, int place,
                              Source source = CAST_CALLER) {
  wait_by<mbarrier_try_wait_cluster>(barrier, parity, what, place, source);
}

#endif
#else

struct Source {};
#define CAST_CALLER \
  Source {}

struct Watched {};

#ifdef __CUDACC__

CAST_DEVICE void watch(const Watched&) {}

CAST_DEVICE void wait(uint64_t* barrier, uint32_t parity, Awaited, int, Source = CAST_CALLER) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}
CAST_DEVICE void wait_cluster(uint64_t* barrier, uint32_t parity, Awaited, int, Source = CAST_CALLER) {
  while (!mbarrier_try_wait_cluster(barrier, parity)) {
  }
}

#endif
#endif

}  // namespace cast::cuda
