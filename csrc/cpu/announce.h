// What a register tile reads, as told to ThreadSanitizer.
//
// A tile reads whole rows and whole vectors, so it may read past the rows or columns that count, into memory that
// another thread is writing; what it finds there is never used. ThreadSanitizer cannot know that. Under it the tile's
// own reads go unwatched, and whoever calls the tile announces the part that counts. Elsewhere this is nothing.
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
