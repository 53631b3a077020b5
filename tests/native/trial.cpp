#include "trial.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <mutex>
#include <thread>

namespace cast::test {
namespace {

std::atomic<int> made{0}, failed{0};

bool same_bits(const Values<float>& a, const Values<float>& b, std::string* where) {
  if (a.size() != b.size()) return *where = "the set of results", false;
  for (const auto& [name, x] : a) {
    const auto found = b.find(name);
    if (found == b.end() || found->second.size() != x.size() ||
        (!x.empty() && std::memcmp(x.data(), found->second.data(), sizeof(float) * x.size()) != 0))
      return *where = name, false;
  }
  return true;
}

void check_same(const Trial& trial, const Values<float>& a, const Values<float>& b, const std::string& when) {
  std::string where;
  const bool same = same_bits(a, b, &where);
  check(same, trial.name() + ": " + where + " has other bits " + when);
}

struct Error {
  double rms = 0, top = 0;
};

Error error_of(const std::vector<float>& x, const std::vector<double>& truth) {
  Error e;
  for (std::size_t i = 0; i < truth.size(); ++i) {
    const double off = std::fabs(double(x[i]) - truth[i]);
    e.rms += off * off;
    e.top = off > e.top || std::isnan(off) ? off : e.top;
  }
  e.rms = std::sqrt(e.rms / double(truth.size()));
  return e;
}

// The squares of one result's errors relative to its size, summed over problems: ours and plain float's.
struct Pool {
  double ours = 0, plain = 0;
};
std::map<std::string, Pool> pools;

// One problem's bound is loose, because a small tensor's error scatters by a factor of three between equally good orders
// of summation; check_pools holds all problems together to twice the error of the same formulas in plain float.
void check_accuracy(const Trial& trial, const Values<float>& ours) {
  const Values<double> exact = trial.exact();
  const Values<float> plain = trial.plain();
  for (const auto& [name, truth] : exact) {
    const auto found = ours.find(name);
    if (found == ours.end() || found->second.size() != truth.size()) {
      check(false, trial.name() + ": " + name + " is missing");
      continue;
    }
    double size = 0;
    for (const double x : truth) size = std::fmax(size, std::fabs(x));
    const Error error = error_of(found->second, truth), allowed = error_of(plain.at(name), truth);
    const bool good = error.rms <= std::fmax(4 * allowed.rms, std::ldexp(size, -20)) &&
                      error.top <= std::fmax(8 * allowed.top, std::ldexp(size, -19));
    char text[200];
    std::snprintf(text, sizeof(text), ": error rms %.2e (plain float %.2e), max %.2e (%.2e), size %.2e", error.rms,
                  allowed.rms, error.top, allowed.top, size);
    check(good, trial.name() + ": " + name + text);
    if (size == 0) continue;  // a softmax over one key passes no gradient
    pools[name].ours += error.rms * error.rms / (size * size);
    pools[name].plain += allowed.rms * allowed.rms / (size * size);
  }
}

void check_written(const Trial& trial, const Values<float>& ours) {
  for (const auto& [name, x] : ours) {
    i64 missing = 0;
    for (const float v : x) missing += std::isfinite(v) ? 0 : 1;
    check(missing == 0, trial.name() + ": " + name + " has " + std::to_string(missing) + " of " +
                            std::to_string(x.size()) + " floats not written, or computed from unwritten memory");
  }
}

}  // namespace

void check(bool holds, const std::string& what) {
  ++made;
  if (holds) return;
  ++failed;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  std::printf("FAIL %s\n", what.c_str());
}

int checks_made() { return made; }
int checks_failed() { return failed; }

void examine(const Trial& trial, int repeats) {
  try {
    const Values<float> first = trial.run(1, Via::guarded_workspace);
    check_written(trial, first);
    check_accuracy(trial, first);
    check_same(trial, first, trial.run(1, Via::entry_points), "through the entry points");
    for (const int threads : {2, 3}) {
      const std::string with = "with " + std::to_string(threads) + " threads";
      check_same(trial, first, trial.run(threads, Via::guarded_workspace), with);
      check_same(trial, first, trial.run(threads, Via::entry_points), with + " through the entry points");
    }
    for (int repeat = 0; repeat < repeats; ++repeat)
      check_same(trial, first, trial.run(1 + repeat % 3, Via::entry_points), "in a repeat");
  } catch (const Damage& damage) {
    check(false, trial.name() + ": " + damage.what);
  }
}

void check_pools(const std::string& op) {
  std::string worst;
  double most = 0;
  for (const auto& [name, pool] : pools) {
    const double ratio = std::sqrt(pool.ours / pool.plain);
    char text[120];
    std::snprintf(text, sizeof(text), "%s: %s has %.2f times the error of plain float over all problems", op.c_str(),
                  name.c_str(), ratio);
    check(ratio <= 2, text);
    if (ratio > most) most = ratio, worst = text;
  }
  std::printf("%s\n", worst.c_str());
  pools.clear();
}

void examine_together(const Trials& trials) {
  std::vector<Values<float>> alone;
  for (const auto& trial : trials) alone.push_back(trial->run(1, Via::entry_points));
  std::vector<std::thread> team;
  for (std::size_t member = 0; member < 4; ++member)
    team.emplace_back([&, member] {
      for (std::size_t i = 0; i < trials.size(); ++i) {
        const std::size_t at = (i + member) % trials.size();
        try {
          check_same(*trials[at], alone[at], trials[at]->run(2, Via::entry_points), "beside other callers");
        } catch (const Damage& damage) {
          check(false, trials[at]->name() + " beside other callers: " + damage.what);
        }
      }
    });
  for (std::thread& member : team) member.join();
}

}  // namespace cast::test
