// Tells ThreadSanitizer the valid part of a register tile's reads.
//
// A tile reads whole rows and whole vectors. So it may read past the valid rows and columns, from memory that another
// thread is writing, and it never uses these values. ThreadSanitizer cannot know that. In its build the tile's own
// reads are not watched, and the tile's caller announces the valid part. In other builds announce_reads does nothing.
#pragma once

#include "simd.h"

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_read_range(void* address, long size);
#define CAST_TILE inline __attribute__((noinline, no_sanitize_thread))
#else
#define CAST_TILE CAST_INLINE
#endif

CAST_ISA_BEGIN

// `rows` rows of `columns` floats, `stride` floats apart.
CAST_INLINE void announce_reads([[maybe_unused]] const float* at, [[maybe_unused]] i64 rows,
                                [[maybe_unused]] i64 stride, [[maybe_unused]] i64 columns) {
#if defined(__SANITIZE_THREAD__)
  for (i64 r = 0; r < rows; ++r) __tsan_read_range(const_cast<float*>(at + r * stride), long(sizeof(float)) * columns);
#endif
}

CAST_ISA_END
