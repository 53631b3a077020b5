// Jobs of different sizes that run as one set of tasks, in a list of fixed size: a call allocates nothing for it.
#pragma once

#include "simd.h"

namespace cast::cpu {

// Throws std::length_error. Defined once, outside of every level, because its message is a std::string.
[[noreturn]] void refuse_job(const char* list, int most);

}  // namespace cast::cpu

CAST_ISA_BEGIN

// At most kMost jobs; the refusal of one more names the list by `Job::kList`.
template <class Job, int kMost>
class JobList {
 public:
  // The job owns the next `tasks` tasks.
  void add(const Job& job, i64 tasks) {
    if (count_ == kMost) refuse_job(Job::kList, kMost);
    jobs_[count_] = job;
    first_task_[count_++] = tasks_;
    tasks_ += tasks;
  }

  i64 tasks() const { return tasks_; }

  // Calls body(job, the task's number within the job) for one of the list's tasks.
  template <class Body>
  void run(i64 task, const Body& body) const {
    int j = count_ - 1;
    while (first_task_[j] > task) --j;
    body(jobs_[j], task - first_task_[j]);
  }

 private:
  Job jobs_[kMost];
  i64 first_task_[kMost];
  int count_ = 0;
  i64 tasks_ = 0;
};

CAST_ISA_END
