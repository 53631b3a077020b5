// A ring of places in shared memory between one thread that fills them by copies and the threads that read them.
#pragma once
#include "ptx.cuh"

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
  CAST_DEVICE void wait_empty(RingBarriers<PLACES>& barriers) const {
    while (!mbarrier_try_wait(&barriers.empty[place], round ^ 1)) {
    }
  }

  // The reading side: the place is full.
  CAST_DEVICE void wait_full(RingBarriers<PLACES>& barriers) const {
    while (!mbarrier_try_wait(&barriers.full[place], round)) {
    }
  }
};

}  // namespace cast::cuda
