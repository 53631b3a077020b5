// What an op provides to be tested, and the properties that every op is held to.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "guarded.h"

namespace cast::test {

template <class T>
using Values = std::map<std::string, std::vector<T>>;

// How a trial reaches the core: the public entry points with the core's own scratch memory, or the selected level's
// table with scratch memory of exactly the size that the level asks for, guarded and poisoned.
enum class Via { entry_points, guarded_workspace };

// One op on one problem, with fixed random inputs.
class Trial {
 public:
  virtual ~Trial() = default;
  virtual std::string name() const = 0;
  // Forward and backward on guarded, poisoned memory: every result, by name. Throws Damage if a guard was overwritten.
  virtual Values<float> run(int threads, Via via) const = 0;
  // The same results from plain loops; what only the core knows (its saved state) is left out.
  virtual Values<double> exact() const = 0;
  virtual Values<float> plain() const = 0;
};

struct Damage {
  std::string what;
};

using Trials = std::vector<std::unique_ptr<Trial>>;

struct Op {
  const char* name;
  std::function<Trials(bool few)> trials;  // `few`: a short list for emulators
  std::function<void()> more;              // what only this op must hold: refusals, gradients not wanted
};

// Counts a check, and reports and counts a failure.
void check(bool holds, const std::string& what);

// Every property in turn; see trial.cpp.
void examine(const Trial& trial, int repeats);

// The accuracy of all trials examined since the last call, together.
void check_pools(const std::string& op);

// All trials at once from several threads, each of which asks for two.
void examine_together(const Trials& trials);

int checks_made();
int checks_failed();

}  // namespace cast::test
