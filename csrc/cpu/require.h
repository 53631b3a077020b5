// Refusals shared by every op's entry points.
#pragma once

#include <stdexcept>
#include <string>

#include "base.h"

namespace cast::cpu {

static inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

static inline void require_at_least(i64 least, i64 value, const char* name) {
  require(value >= least,
          std::string(name) + " is " + std::to_string(value) + ", but must be at least " + std::to_string(least));
}

}  // namespace cast::cpu
