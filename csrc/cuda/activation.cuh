// GELU as the paper's code has it (erf), and its derivative.
#pragma once
#include "numbers.cuh"

namespace cast::cuda {

CAST_DEVICE float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678f)); }

// Phi(x) + x phi(x)
CAST_DEVICE float gelu_gradient(float x) {
  const float density = 0.39894228f * exp2_approximate(-0.72134752f * x * x);  // exp(-x^2 / 2) / sqrt(2 pi)
  return fmaf(x, density, 0.5f * (1.f + erff(x * 0.70710678f)));
}

template <class T>
CAST_DEVICE uint32_t gelu_pair(uint32_t packed) {
  const float2 h = unpack<T>(packed);
  return pack<T>(gelu(h.x), gelu(h.y));
}

}  // namespace cast::cuda
