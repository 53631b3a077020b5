// LayerNorm over one row, forward and backward, and the adds of position tables.
#pragma once

#include "simd.h"

CAST_ISA_BEGIN

// Sum of f(column) over the row; f must return zero in lanes past the row's end.
template <class F>
CAST_INLINE float row_sum(i64 d, const F& f) {
  vec sum = vec{};
  for (i64 c = 0; c < d; c += kLanes) sum += f(c);
  return sum_of(sum);
}

struct RowStatistics {
  float mean, rstd;
};
inline RowStatistics row_statistics(const float* x, i64 d, float eps) {
  const float mean = row_sum(d, [&](i64 c) { return load_first(x + c, d - c); }) / float(d);
  const float squares = row_sum(d, [&](i64 c) {
    const vec centred = load_first(x + c, d - c) - mean;
    return d - c >= kLanes ? centred * centred : zero_from(centred * centred, d - c);
  });
  const float variance = squares / float(d);
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

// `lanes` values of n = (x - mean) * rstd * gamma + beta from column c.
CAST_INLINE vec normalised(const float* x, RowStatistics s, const float* gamma, const float* beta, i64 c, i64 lanes) {
  const vec hat = (load_first(x + c, lanes) - s.mean) * s.rstd;
  return hat * load_first(gamma + c, lanes) + load_first(beta + c, lanes);
}

// n = normed * gamma + beta with normed = (x - mean) * rstd. `normed` may be null or equal to x; `n` may equal x.
inline float normalise_row(const float* x, i64 d, const float* gamma, const float* beta, float eps, float* n,
                           float* normed) {
  const RowStatistics s = row_statistics(x, d, eps);
  for (i64 c = 0; c < d; c += kLanes) {
    const i64 lanes = d - c;
    const vec hat = (load_first(x + c, lanes) - s.mean) * s.rstd;
    if (normed) store_first(normed + c, hat, lanes);
    store_first(n + c, hat * load_first(gamma + c, lanes) + load_first(beta + c, lanes), lanes);
  }
  return s.rstd;
}

// n = normed * gamma + beta, with the bits of normalise_row.
inline void scale_and_shift_row(const float* normed, i64 d, const float* gamma, const float* beta, float* n) {
  for (i64 c = 0; c < d; c += kLanes) {
    const i64 lanes = d - c;
    store_first(n + c, load_first(normed + c, lanes) * load_first(gamma + c, lanes) + load_first(beta + c, lanes),
                lanes);
  }
}

// du = rstd * (g - mean(g) - normed * mean(g * normed)) with g = dn * gamma; dn * normed and dn are added to the
// partial sums of gamma's and beta's gradients.
inline void normalise_row_backward(const float* dn, const float* normed, float rstd, i64 d, const float* gamma,
                                   float* du, float* dgamma, float* dbeta) {
  const auto scaled = [&](i64 c) { return load_first(dn + c, d - c) * load_first(gamma + c, d - c); };
  const float mean = row_sum(d, scaled) / float(d);
  const float slope = row_sum(d, [&](i64 c) { return scaled(c) * load_first(normed + c, d - c); }) / float(d);
  for (i64 c = 0; c < d; c += kLanes) {
    const i64 lanes = d - c;
    const vec grad = load_first(dn + c, lanes), hat = load_first(normed + c, lanes);
    store_first(dgamma + c, load_first(dgamma + c, lanes) + grad * hat, lanes);
    store_first(dbeta + c, load_first(dbeta + c, lanes) + grad, lanes);
    store_first(du + c, (scaled(c) - mean - hat * slope) * rstd, lanes);
  }
}

inline void add_rows(const float* a, const float* b, i64 d, float* sum) {
  for (i64 c = 0; c < d; c += kLanes) store_first(sum + c, load_first(a + c, d - c) + load_first(b + c, d - c), d - c);
}

inline void gelu_rows(float* x, i64 floats) {
  for (i64 i = 0; i < floats; i += kLanes) store_first(x + i, gelu(load_first(x + i, floats - i)), floats - i);
}

CAST_ISA_END
