// Types and helpers of every op's problem.
//
// Every instruction-set level includes this file, so it has only functions with internal linkage. Of a shared inline
// function the linker might keep the AVX-512 copy, which crashes on an older processor.
#pragma once

#include <cstdint>

// CMakeLists.txt undoes such flags. A build by other means would have silent errors of 8e-2.
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__NO_SIGNED_ZEROS__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "the kernels need IEEE arithmetic; remove -ffast-math, -Ofast and their parts from the compiler's flags"
#endif

namespace cast::cpu {

using i64 = std::int64_t;

// The values that backward computes again instead of reading them from `saved`. Each op defines its values per level.
enum Recompute : int { kNothing = 0, kCheap = 1, kAll = 2 };

static inline i64 align16(i64 floats) { return (floats + 15) / 16 * 16; }

// Returns the offset of the next region of `floats` floats and moves `cursor` behind it.
static inline i64 take(i64& cursor, i64 floats) {
  const i64 at = cursor;
  cursor += floats;
  return at;
}

}  // namespace cast::cpu
