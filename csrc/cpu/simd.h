// Vectors of one instruction-set level in GNU vector extensions, and the elementwise mathematics on them.
//
// All code here and in the headers that include it lies in an unnamed namespace inside the level's namespace, so no
// symbol of one level can replace another's.
#pragma once

#include <cstring>

#include "base.h"

#define CAST_ISA_BEGIN \
  namespace cast::cpu::CAST_ISA { \
  namespace {
#define CAST_ISA_END \
  } \
  }
#define CAST_INLINE inline __attribute__((always_inline))

CAST_ISA_BEGIN

// Main GEMM tile: kTileRows x (kTileVecs * kLanes) accumulators. Registers needed = rows * vecs + vecs + 1.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 14, kTileVecs = 2;    // 28 + 2 + 1 of 32
constexpr int kScoreRows = 8, kScoreVecs = 3;                // 24 + 3 + 1
constexpr int kRowBlock = 112;                               // rows that share one pass over the weights
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 6, kTileVecs = 2;      // 12 + 2 + 1 of 16
constexpr int kScoreRows = 4, kScoreVecs = 3;                // 12 + 3 + 1
constexpr int kRowBlock = 96;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 8, kTileVecs = 3;      // 24 + 3 + 1 of 32
constexpr int kScoreRows = 8, kScoreVecs = 3;
constexpr int kRowBlock = 96;
#else
constexpr int kLanes = 4, kTileRows = 4, kTileVecs = 2;      // 8 + 2 + 1, and one for each product: no FMA here
constexpr int kScoreRows = 4, kScoreVecs = 2;
constexpr int kRowBlock = 96;
#endif
constexpr int kTileColumns = kTileVecs * kLanes;
static_assert(kRowBlock % kTileRows == 0, "a row block is whole tiles");

typedef float vec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t ivec __attribute__((vector_size(kLanes * 4)));
typedef float unaligned_vec __attribute__((vector_size(kLanes * 4), aligned(4)));

CAST_INLINE vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
CAST_INLINE void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }
CAST_INLINE vec broadcast(float x) { return vec{} + x; }
CAST_INLINE i64 min_of(i64 a, i64 b) { return a < b ? a : b; }
CAST_INLINE i64 max_of(i64 a, i64 b) { return a > b ? a : b; }
CAST_INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
CAST_INLINE i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

// The first n floats (n >= 0), zeros behind them; nothing past p + n is touched.
CAST_INLINE vec load_first(const float* p, i64 n) {
  if (n >= kLanes) return load(p);
  float lanes[kLanes] = {};
  for (i64 i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

CAST_INLINE void store_first(float* p, vec v, i64 n) {
  if (n >= kLanes) return store(p, v);
  float lanes[kLanes];
  store(lanes, v);
  for (i64 i = 0; i < n; ++i) p[i] = lanes[i];
}

CAST_INLINE vec zero_from(vec v, i64 n) {
  float lanes[kLanes];
  store(lanes, v);
  for (i64 i = n; i < kLanes; ++i) lanes[i] = 0.0f;
  return load(lanes);
}

CAST_INLINE float sum_of(vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// These two return NaN for a NaN in `a`.
CAST_INLINE vec max_of(vec a, vec b) { return a < b ? b : a; }
CAST_INLINE vec min_of(vec a, vec b) { return a > b ? b : a; }

// 2^x for x <= 127. Below -126 the result is 2^-126; every caller adds it to a sum of at least one. The polynomial is a
// minimax fit on [-1/2, 1/2], relative error 1.9e-9 before rounding. Adding 1.5 * 2^23 rounds x to an integer in the
// low bits; shifted into the exponent they scale the polynomial.
CAST_INLINE vec exp2(vec x) {
  x = max_of(x, broadcast(-126.0f));
  const vec shifted = x + 12582912.0f;
  const vec f = x - (shifted - 12582912.0f);
  vec y = broadcast(1.534580804e-4f);
  y = y * f + 1.339993207e-3f;
  y = y * f + 9.618489072e-3f;
  y = y * f + 5.550328642e-2f;
  y = y * f + 2.402264625e-1f;
  y = y * f + 6.931471825e-1f;
  y = y * f + 1.0f;
  return (vec)((ivec)y + ((ivec)shifted << 23));
}

struct Normal {
  vec cdf, density;  // of the standard normal distribution
};

// With z = |x|, the tail 1 - cdf(z) is exp(-z^2/2) * R(z), and R(z) * (z + 3.5) is smooth in u = (z - 3.5)/(z + 3.5):
// a minimax polynomial of degree 7 (relative error 6e-9 for z < 2.5, looser where the tail itself vanishes). No
// cancellation for negative x, unlike 1 + erf.
CAST_INLINE Normal normal(vec x) {
  const vec z = (vec)((ivec)x & 0x7fffffff);
  const vec r = 1.0f / (z + 3.5f);
  const vec u = (z - 3.5f) * r;
  vec y = broadcast(-1.084668911e-3f);
  y = y * u - 3.509296104e-3f;
  y = y * u + 6.476406470e-3f;
  y = y * u + 1.746087335e-2f;
  y = y * u - 1.160371602e-1f;
  y = y * u + 3.154248297e-1f;
  y = y * u - 5.655620694e-1f;
  y = y * u + 7.444160581e-1f;
  const vec gauss = exp2(x * x * -0.72134752f);  // -log2(e) / 2
  const vec tail = gauss * (y * r);
  return {x < 0.0f ? tail : 1.0f - tail, gauss * 0.39894228f};
}

// Exact (erf) GELU and its derivative.
CAST_INLINE vec gelu(vec x) { return x * normal(x).cdf; }
CAST_INLINE vec gelu_slope(vec x) {
  const Normal n = normal(x);
  return n.cdf + x * n.density;
}

// QuickGELU = x * sigmoid(1.702 x), and its derivative. With e = exp(-1.702 x): sigmoid = 1 / (1 + e), and 1 - sigmoid
// = e * sigmoid, without cancellation. Up to e = 2^126 the sigmoid is a normal number.
struct Sigmoid {
  vec value, rest;  // rest is 1 - value
};
CAST_INLINE Sigmoid quick_gelu_gate(vec x) {
  const vec e = exp2(min_of(x * -2.45546696f, broadcast(126.0f)));  // -1.702 log2(e)
  const vec value = 1.0f / (1.0f + e);
  return {value, e * value};
}
CAST_INLINE vec quick_gelu(vec x) { return x * quick_gelu_gate(x).value; }
CAST_INLINE vec quick_gelu_slope(vec x) {
  const Sigmoid s = quick_gelu_gate(x);
  return s.value + s.value * s.rest * (1.702f * x);
}

// Transposes a kLanes x kLanes block by log2(kLanes) rounds of perfect shuffles.

#if defined(__AVX512F__)
#define CAST_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define CAST_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define CAST_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define CAST_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define CAST_LOW 0, 4, 1, 5
#define CAST_HIGH 2, 6, 3, 7
#endif

CAST_INLINE void transpose(vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shufflevector(rows[i], rows[i + kLanes / 2], CAST_LOW);
      next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + kLanes / 2], CAST_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

#undef CAST_LOW
#undef CAST_HIGH

CAST_ISA_END
