// Task loop over the process's OpenMP pool.
#pragma once

#include "simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

CAST_ISA_BEGIN

// body(task, thread) for every task, in no order. One thread never enters a parallel region: a forked data-loader
// worker would wait there for pool threads that did not survive the fork.
template <class Body>
void parallel_for(i64 tasks, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && tasks > 1) {
    const int team = int(min_of(threads, tasks));
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
    for (i64 task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
    return;
  }
#endif
  for (i64 task = 0; task < tasks; ++task) body(task, 0);
}

CAST_ISA_END
