// Task loop over the process's OpenMP pool.
#pragma once

#include "simd.h"

#if defined(CAST_STD_THREADS)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

CAST_ISA_BEGIN

// Calls body(task, thread) for every task, in any order. With one thread it never enters a parallel region: a forked
// data-loader worker would wait there for pool threads that did not survive the fork.
//
// CAST_STD_THREADS is for ThreadSanitizer alone: it does not see the barriers of GCC's OpenMP library and would report
// every correct program. A new team for every loop is slow, but orders memory exactly as the pool does: the code before
// the loop, the tasks in any order, the code after it. Threads take tasks by turns, so that each has some and chance
// gives no order between them.
template <class Body>
void parallel_for(i64 tasks, int threads, const Body& body) {
#if defined(CAST_STD_THREADS)
  if (threads > 1 && tasks > 1) {
    const int members = int(min_of(threads, tasks));
    std::vector<std::thread> team;
    for (int thread = 0; thread < members; ++thread)
      team.emplace_back([&body, tasks, members, thread] {
        for (i64 task = thread; task < tasks; task += members) body(task, thread);
      });
    for (std::thread& member : team) member.join();
    return;
  }
#elif defined(_OPENMP)
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
