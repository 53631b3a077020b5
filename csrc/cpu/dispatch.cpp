#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace cast::cpu {
namespace {

struct Level {
  const Kernels* kernels;
  bool supported;
};

// Best first. Every feature that a level's compiler flags enable is asked for, not only its headline one.
const Level* levels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  static const Level all[] = {
#ifdef CAST_HAVE_AVX512
      {&avx512::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#ifdef CAST_HAVE_AVX2
      {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&baseline::kernels, true},
      {nullptr, false}};
  return all;
}

const Kernels& choose() {
  const char* value = std::getenv("CAST_KERNELS_CPU_ISA");
  const std::string cap = value && *value ? value : "avx512";
  if (cap != "baseline" && cap != "avx2" && cap != "avx512")
    throw std::invalid_argument("CAST_KERNELS_CPU_ISA is '" + cap +
                                "', but must be one of baseline, avx2, avx512 (or unset, for the best level)");
  const auto rank = [](const std::string& name) { return name == "avx512" ? 2 : name == "avx2" ? 1 : 0; };
  const Level* level = levels();
  while (!level->supported || rank(level->kernels->name) > rank(cap)) ++level;
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
