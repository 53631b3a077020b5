// What every op's problem is made of.
//
// Included by every instruction-set level, so only internal-linkage functions live here: a shared inline function could
// be merged by the linker into its AVX-512 copy and crash an older machine.
#pragma once

#include <cstdint>

// CMakeLists.txt takes such flags back; a build by other means would be wrong by 8e-2 without a word.
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__NO_SIGNED_ZEROS__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "the kernels need IEEE arithmetic; remove -ffast-math, -Ofast and their parts from the compiler's flags"
#endif

namespace cast::cpu {

using i64 = std::int64_t;

// What backward computes again instead of finding it kept. Each op says which values that means.
enum Recompute : int { kNothing = 0, kCheap = 1, kAll = 2 };

static inline i64 align16(i64 floats) { return (floats + 15) / 16 * 16; }

// Hands out consecutive regions: the region's offset, with `cursor` moved behind it.
static inline i64 take(i64& cursor, i64 floats) {
  const i64 at = cursor;
  cursor += floats;
  return at;
}

}  // namespace cast::cpu
