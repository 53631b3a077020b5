// Tests of the native core that need neither Python nor torch, so that they run under sanitizers and emulators.
//
//   native_tests [--few] [--repeats COUNT] [--level NAME] [--op NAME]
//
// --few      a short list of small cases: for emulators and ThreadSanitizer
// --repeats  runs of each case that must give the same bits; 50 unless told
// --level    fail unless this instruction-set level is the one in use (CAST_KERNELS_CPU_ISA caps it)
// --op       only this op
//
// To add an op: one file with its trials, a line in ops.h, its name in CMakeLists.txt.
#include <termios.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "../../csrc/cpu/kernels.h"
#include "ops.h"

using namespace cast::test;

namespace {

int usage(const char* why) {
  std::fprintf(stderr, "%s\nusage: native_tests [--few] [--repeats COUNT] [--level NAME] [--op NAME]\n", why);
  return 2;
}

void run(const Op& op, bool few, int repeats) {
  const Trials trials = op.trials(few);
  for (const auto& trial : trials) examine(*trial, repeats);
  check_pools(op.name);
  examine_together(trials);
  op.more();
  std::printf("%s: %zu problems\n", op.name, trials.size());
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** words) {
  bool few = false;
  int repeats = 50;
  std::string level, only;
  for (int i = 1; i < count; ++i) {
    const bool more = i + 1 < count;
    if (!std::strcmp(words[i], "--few"))
      few = true;
    else if (!std::strcmp(words[i], "--repeats") && more)
      repeats = std::atoi(words[++i]);
    else if (!std::strcmp(words[i], "--level") && more)
      level = words[++i];
    else if (!std::strcmp(words[i], "--op") && more)
      only = words[++i];
    else
      return usage((std::string("cannot use argument ") + words[i]).c_str());
  }
  try {
    const std::string used = cast::cpu::selected_kernels().name;
    std::printf("level %s of %s\n", used.c_str(), cast::cpu::built_levels());
    if (!level.empty() && level != used) return usage(("the level in use is " + used + ", not " + level).c_str());
    check_job_lists();
    int found = 0;
    for (const Op& op : all_ops())
      if (only.empty() || only == op.name) ++found, run(op, few, repeats);
    if (!found) return usage(("there is no op " + only).c_str());
  } catch (const std::exception& error) {
    std::printf("FAIL %s\n", error.what());
    return 1;
  }
  std::printf("%d checks, %d failed\n", checks_made(), checks_failed());
  std::fflush(stdout);
  tcdrain(STDOUT_FILENO);  // an emulated machine stops with its first process, whatever its console still holds
  return checks_failed() ? 1 : 0;
}
