#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

// CMakeLists.txt appends options that turn SSE3 and its successors off. It cannot turn these off: leave them out of
// CXXFLAGS.
#if defined(__x86_64__) && (defined(__SSE3__) || defined(__POPCNT__) || defined(__LZCNT__) || defined(__BMI__) || \
                            defined(__BMI2__) || defined(__MOVBE__) || defined(__ADX__))
#error "this file must run on every x86-64 processor; remove options such as -mbmi2 and -mpopcnt from CXXFLAGS"
#endif

namespace cast::cpu {
namespace {

struct Level {
  const Kernels* kernels;
  bool supported;
};

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma");
}
#endif

// Best first. A level is supported if the processor has every feature that its compiler flags enable, not only the one
// in its name.
const Level* levels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  static const Level all[] = {
#ifdef CAST_HAVE_AVX512_BF16
      {&avx512_bf16::kernels, has_avx512() && __builtin_cpu_supports("avx512bf16")},
#endif
#ifdef CAST_HAVE_AVX512
      {&avx512::kernels, has_avx512()},
#endif
#ifdef CAST_HAVE_AVX2
      {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&baseline::kernels, true},
      {nullptr, false}};
  return all;
}

// In rising order; a cap allows its own level and all before it.
const char* const kLevelNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

int rank_of(const std::string& name) {
  int rank = 0;
  for (const char* known : kLevelNames) {
    if (name == known) return rank;
    ++rank;
  }
  return -1;
}

const Kernels& choose() {
  const char* value = std::getenv("CAST_KERNELS_CPU_ISA");
  const std::string cap = value && *value ? value : "avx512_bf16";
  if (rank_of(cap) < 0)
    throw std::invalid_argument("CAST_KERNELS_CPU_ISA is '" + cap +
                                "', but must be one of baseline, avx2, avx512, avx512_bf16 (or unset, for the best)");
  const Level* level = levels();
  while (!level->supported || rank_of(level->kernels->name) > rank_of(cap)) ++level;
  return *level->kernels;
}

}  // namespace

const Kernels& selected_kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* built_levels() {
  static const std::string names = [] {
    std::string list;
    for (const Level* l = levels(); l->kernels; ++l) list += (list.empty() ? "" : ",") + std::string(l->kernels->name);
    return list;
  }();
  return names.c_str();
}

}  // namespace cast::cpu
