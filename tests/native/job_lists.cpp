// The lists of fixed size that a call fills: each takes what it declares, runs every task of it once, and refuses one
// job more by name. What the ops fill them with is tried by the ops' own trials: a list too short would end one.
#include <stdexcept>
#include <string>

// A level of our own name, so that no symbol here stands in for one of the core's.
#define CAST_ISA job_list_test
#pragma GCC diagnostic ignored "-Wunused-function"
#include "../../csrc/cpu/weight_sums.h"
#include "ops.h"

namespace cast::test {
namespace {

using namespace cast::cpu::job_list_test;

template <class Job, int kMost>
void check_list(JobList<Job, kMost> list, const std::string& name) {
  try {
    for (int j = 0; j < kMost; ++j) list.add(Job{}, j % 3);  // some without a task
  } catch (const std::length_error&) {
    return check(false, name + " refuses a job that it has room for");
  }
  cpu::i64 expected = 0;
  for (int j = 0; j < kMost; ++j) expected += j % 3;
  check(list.tasks() == expected, name + " counts its tasks");
  cpu::i64 before = -1, again = 0;
  for (cpu::i64 task = 0; task < list.tasks(); ++task)
    list.run(task, [&](const Job&, cpu::i64 own) {
      again += own == before + 1 || own == 0 ? 0 : 1;
      before = own;
    });
  check(again == 0, name + " hands out a job's tasks in their order");
  std::string refusal;
  try {
    list.add(Job{}, 1);
  } catch (const std::length_error& error) {
    refusal = error.what();
  }
  const std::string begin = name + " holds at most " + std::to_string(kMost) + " jobs";
  check(refusal.rfind(begin, 0) == 0, name + " takes a job too many, or says: " + refusal);
}

}  // namespace

void check_job_lists() {
  check_list(PackJobs(), "PackJobs");
  check_list(SumTasks(), "SumTasks");
}

}  // namespace cast::test
