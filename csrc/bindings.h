// Shared by the bindings of every op. Python sees pointers as integers: no torch header, so one build serves every
// torch version.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/base.h"

namespace cast::cpu {

using Address = std::uintptr_t;

inline const float* input(Address a) { return reinterpret_cast<const float*>(a); }
inline float* output(Address a) { return reinterpret_cast<float*>(a); }

// A structure of pointers, from one address a field, in the fields' order.
template <class T>
T tensors(const std::array<Address, sizeof(T) / sizeof(void*)>& addresses) {
  T result;
  std::memcpy(&result, addresses.data(), sizeof(result));
  return result;
}

inline int checked_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + ", but must be at least 1");
  return threads;
}

inline Recompute checked_recompute(int recompute) {
  if (recompute < kNothing || recompute > kAll)
    throw std::invalid_argument("recompute is " + std::to_string(recompute) +
                                ", but must be 0 (nothing), 1 (cheap) or 2 (all)");
  return Recompute(recompute);
}

// Each op's part of the module, in bindings_<op>.cpp.
void bind_ffn(pybind11::module_& m);
void bind_self_attention(pybind11::module_& m);

}  // namespace cast::cpu
