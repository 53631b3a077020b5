// Sixteen floats or integers at once, in the compiler's own terms; the fused multiply-add in the processor's.
#pragma once

#include <cmath>

#include "machine.h"

#if defined(__x86_64__) && (defined(__AVX512F__) || defined(__FMA__))
#include <immintrin.h>
#endif

namespace ptx::PTX_LEVEL {

typedef float v16 __attribute__((vector_size(64)));
typedef i32 i32x16 __attribute__((vector_size(64)));
typedef u32 u32x16 __attribute__((vector_size(64)));
typedef i32 i32x4 __attribute__((vector_size(16)));
typedef i16 i16x4 __attribute__((vector_size(8)));

#if defined(__clang__)
#define PTX_UNROLL _Pragma("clang loop unroll(full)")
#else
#define PTX_UNROLL _Pragma("GCC unroll 16")
#endif

template <class V>
V load_vector(const void* at) {
  V value;
  std::memcpy(&value, at, sizeof(V));
  return value;
}
template <class V>
void store_vector(void* at, V value) {
  std::memcpy(at, &value, sizeof(V));
}

inline v16 broadcast(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

inline v16 multiply_add(v16 a, v16 b, v16 c) {
#if defined(__x86_64__) && defined(__AVX512F__)
  return v16(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__x86_64__) && defined(__FMA__)
  v16 out;
  for (int h = 0; h < 2; ++h) {
    const __m256 x = _mm256_loadu_ps(reinterpret_cast<const float*>(&a) + 8 * h);
    const __m256 y = _mm256_loadu_ps(reinterpret_cast<const float*>(&b) + 8 * h);
    const __m256 z = _mm256_loadu_ps(reinterpret_cast<const float*>(&c) + 8 * h);
    _mm256_storeu_ps(reinterpret_cast<float*>(&out) + 8 * h, _mm256_fmadd_ps(x, y, z));
  }
  return out;
#else
  for (int i = 0; i < 16; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

inline bool any(i32x16 mask) {
#if defined(__x86_64__) && defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(mask), __m512i(mask)) != 0;
#else
  u64 words[8], some = 0;
  std::memcpy(words, &mask, 64);
  for (u64 word : words) some |= word;
  return some != 0;
#endif
}

// NaN in its one form.
inline u32x16 canonical(v16 value) {
  const i32x16 nan = value != value;
  const i32x16 bits = i32x16(value);
  return u32x16((nan & 0x7FFFFFFF) | (~nan & bits));
}

}  // namespace ptx::PTX_LEVEL
