// What Python calls: the functions of the highest instruction-set level that this processor has.
#include "levels.h"

#include <cstdlib>
#include <cstring>

#if defined(_WIN32)
#define PTX_EXPORT extern "C" __declspec(dllexport)
#else
#define PTX_EXPORT extern "C" __attribute__((visibility("default")))
#endif

PTX_DECLARE(baseline)
#if defined(PTX_HAVE_AVX2)
PTX_DECLARE(avx2)
#endif
#if defined(PTX_HAVE_AVX512)
PTX_DECLARE(avx512)
#endif

namespace {

struct Level {
  const char* name;
  const char* (*handler)(int64_t);
  int (*run)(void*, const void*, int64_t, const uint8_t*, int64_t);
  int (*walk)(void*, const void*, int64_t, const void*, int64_t);
  void (*product)(void*, const void*);
  void (*operand)(void*, const void*, const uint8_t*, int64_t, int64_t, int64_t, int);
  void* (*copies)(int64_t, int64_t);
  void (*forget)(void*);
  int64_t (*flying)(const void*);
  void (*take)(void*, void*, int64_t, int64_t);
  void* (*products)(int64_t, int64_t, const int32_t*, int64_t);
  void (*drop)(void*);
  int (*idle)(const void*);
  int64_t (*bytes)();
};

#define PTX_THE(level) \
  Level { \
    #level, ptx_handler_##level, ptx_run_##level, ptx_walk_##level, ptx_product_##level, ptx_operand_##level, \
        ptx_copies_##level, ptx_forget_##level, ptx_flying_##level, ptx_take_##level, ptx_products_##level, \
        ptx_drop_##level, ptx_idle_##level, ptx_bytes_##level \
  }

// CAST_KERNELS_CPU_ISA may ask for a lower one, as of the native core.
Level choose() {
  const char* asked = std::getenv("CAST_KERNELS_CPU_ISA");
  if (asked && !std::strcmp(asked, "baseline")) return PTX_THE(baseline);
  [[maybe_unused]] const bool middle = asked && !std::strcmp(asked, "avx2");
#if defined(PTX_HAVE_AVX512)
  if (!middle && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    return PTX_THE(avx512);
#endif
#if defined(PTX_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return PTX_THE(avx2);
#endif
  return PTX_THE(baseline);
}

const Level kLevel = choose();

}  // namespace

PTX_EXPORT const char* ptx_level() { return kLevel.name; }
PTX_EXPORT const char* ptx_handler(int64_t code) { return kLevel.handler(code); }
PTX_EXPORT int ptx_run(void* batch, const void* ops, int64_t count, const uint8_t* live, int64_t step) {
  return kLevel.run(batch, ops, count, live, step);
}
PTX_EXPORT int ptx_walk(void* batch, const void* blocks, int64_t count, const void* ops, int64_t cta) {
  return kLevel.walk(batch, blocks, count, ops, cta);
}
PTX_EXPORT void ptx_product(void* batch, const void* product) { kLevel.product(batch, product); }
PTX_EXPORT void ptx_operand(void* batch, const void* operand, const uint8_t* groups, int64_t count, int64_t number,
                            int64_t step, int reads) {
  kLevel.operand(batch, operand, groups, count, number, step, reads);
}
PTX_EXPORT void* ptx_copies(int64_t ctas, int64_t threads) { return kLevel.copies(ctas, threads); }
PTX_EXPORT void ptx_forget(void* copies) { kLevel.forget(copies); }
PTX_EXPORT int64_t ptx_flying(const void* copies) { return kLevel.flying(copies); }
PTX_EXPORT void ptx_take(void* copies, void* other, int64_t cta, int64_t threads) {
  kLevel.take(copies, other, cta, threads);
}
PTX_EXPORT void* ptx_products(int64_t watched, int64_t keys, const int32_t* columns, int64_t threads) {
  return kLevel.products(watched, keys, columns, threads);
}
PTX_EXPORT void ptx_drop(void* products) { kLevel.drop(products); }
PTX_EXPORT int ptx_idle(const void* products) { return kLevel.idle(products); }
PTX_EXPORT int64_t ptx_bytes() { return kLevel.bytes(); }
