// Products of bfloat16 pairs: with AVX512_BF16 two multiply-adds per lane and instruction.
//
// A word holds the bfloat16 values of two consecutive depths, the lower depth in its lower half. Only the two operands
// of a dense product are bfloat16; sums, statistics, attention, GELU and residuals stay float32. Levels without the
// instruction compute bfloat16 problems with the float32 kernels, which are as fast there and more exact.
#pragma once

#include "simd.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

CAST_ISA_BEGIN

// CAST_EMULATE_BF16 compiles this code for any level with the instruction spelled out. So a processor without
// AVX512_BF16 can test packing, tails and strides.
#if defined(__AVX512BF16__) || defined(CAST_EMULATE_BF16)
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

typedef std::uint32_t uvec __attribute__((vector_size(kLanes * 4)));

// bfloat16 by rounding to nearest even, in the upper half of each lane. NaN stays NaN.
CAST_INLINE uvec rounded_bf16(vec x) {
  const uvec bits = (uvec)x;
  const uvec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const ivec number = x == x;
  return (((uvec)number & rounded) | (~(uvec)number & (bits | 0x400000u))) & 0xffff0000u;
}

// Words of two rows: depth k from `low`, depth k + 1 from `high`.
CAST_INLINE vec pair_words(vec low, vec high) { return (vec)((rounded_bf16(low) >> 16) | rounded_bf16(high)); }

// sum + left.low * right.low + left.high * right.high in each lane.
CAST_INLINE vec dot_pairs(vec sum, std::uint32_t left, vec right) {
#ifdef __AVX512BF16__
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)right);
#else
  float low, high;
  const std::uint32_t low_bits = left << 16, high_bits = left & 0xffff0000u;
  __builtin_memcpy(&low, &low_bits, 4);
  __builtin_memcpy(&high, &high_bits, 4);
  const uvec words = (uvec)right;
  sum += low * (vec)(words << 16);
  return sum + high * (vec)(words & 0xffff0000u);
#endif
}

typedef std::uint16_t halfvec __attribute__((vector_size(kLanes * 2)));

// Rows of float32 as rows of words: to[r][k / 2]. `to` has ceil(depth / 2) words a row; an odd depth's last word has a
// zero half.
inline void pair_rows(const float* from, i64 stride, i64 rows, i64 depth, std::uint32_t* to) {
  const i64 words = ceil_div(depth, 2);
  for (i64 r = 0; r < rows; ++r, from += stride, to += words)
    for (i64 k = 0; k < depth; k += kLanes) {
      // Zero behind the last depth, so whole words can be stored.
      const halfvec halves = __builtin_convertvector(rounded_bf16(load_first(from + k, depth - k)) >> 16, halfvec);
      std::uint32_t* at = to + k / 2;
      if (depth - k >= kLanes)
        __builtin_memcpy(at, &halves, sizeof(halves));
      else
        __builtin_memcpy(at, &halves, sizeof(std::uint32_t) * size_t(ceil_div(depth - k, 2)));
    }
}

CAST_ISA_END
