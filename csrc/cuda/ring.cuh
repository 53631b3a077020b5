// A ring of places in shared memory between one thread that fills them by copies and the threads that read them.
#pragma once
#include "watchdog.h"

namespace cast::cuda {

// Its barriers, in shared memory. `full` counts the bytes of a copy, `empty` the readers that are done.
template <int PLACES>
struct RingBarriers {
  uint64_t full[PLACES], empty[PLACES];

  CAST_DEVICE void init(int readers) {
    for (int i = 0; i < PLACES; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], readers);
    }
  }
};

// A ring whose places are filled by copies to all CTAs of a cluster: a place is empty when each of them has read it.
// Readers say so to a warp of their own CTA, which tells the others.
template <int PLACES, int CTAS>
struct ClusterRingBarriers : RingBarriers<PLACES> {
  uint64_t read[PLACES];

  CAST_DEVICE void init(int readers) {
    RingBarriers<PLACES>::init(CTAS);
    for (uint64_t& barrier : read) mbarrier_init(&barrier, readers);
  }
};

// Where one side stands: which place comes next, and how often the ring has gone round.
template <int PLACES>
struct RingCursor {
  int place = 0;
  uint32_t round = 0;  // its parity

  CAST_DEVICE void next() {
    if (++place == PLACES) {
      place = 0;
      round ^= 1;
    }
  }

  // The filling side: the place is empty. In the first round every place is.
  CAST_DEVICE void wait_empty(RingBarriers<PLACES>& barriers, Source source = CAST_CALLER) const {
    wait(&barriers.empty[place], round ^ 1, Awaited::empty, place, source);
  }
  template <int CTAS>
  CAST_DEVICE void wait_empty(ClusterRingBarriers<PLACES, CTAS>& barriers, Source source = CAST_CALLER) const {
    wait_cluster(&barriers.empty[place], round ^ 1, Awaited::empty, place, source);
  }

  // The reading side: the place is full.
  CAST_DEVICE void wait_full(RingBarriers<PLACES>& barriers, Source source = CAST_CALLER) const {
    wait(&barriers.full[place], round, Awaited::full, place, source);
  }
};

// The warp that tells the cluster which places were read, `count` of them. It stands between the readers and the other
// CTAs because an arrival that the whole cluster may rely on waits for the memory of the whole GPU: here nobody waits
// for it but the ring.
template <int PLACES, int CTAS>
CAST_DEVICE void forward_reads(ClusterRingBarriers<PLACES, CTAS>& barriers, int count) {
  RingCursor<PLACES> at;
  const int lane = threadIdx.x % 32;
  if (lane < CTAS)
    for (int i = 0; i < count; ++i) {
      wait(&barriers.read[at.place], at.round, Awaited::read, at.place);
      mbarrier_arrive_cluster(&barriers.empty[at.place], lane);
      at.next();
    }
  __syncwarp();
}

}  // namespace cast::cuda
