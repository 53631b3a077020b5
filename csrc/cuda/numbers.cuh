// The 16-bit numbers that products read, two in a register, and the other dtypes of tensors.
#pragma once
#include "ptx.cuh"

namespace cast::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

// Two values rounded to T, the first in the lower half.
template <class T>
CAST_DEVICE uint32_t pack(float low, float high);
template <>
CAST_DEVICE uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
CAST_DEVICE uint32_t pack<fp16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

template <class T>
CAST_DEVICE float2 unpack(uint32_t both);
template <>
CAST_DEVICE float2 unpack<bf16>(uint32_t both) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(both));
}
template <>
CAST_DEVICE float2 unpack<fp16>(uint32_t both) {
  return __half22float2(reinterpret_cast<const __half2&>(both));
}

CAST_DEVICE float to_float(float x) { return x; }
CAST_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
CAST_DEVICE float to_float(fp16 x) { return __half2float(x); }

template <class P>
CAST_DEVICE P rounded(float x);
template <>
CAST_DEVICE float rounded<float>(float x) {
  return x;
}
template <>
CAST_DEVICE bf16 rounded<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
CAST_DEVICE fp16 rounded<fp16>(float x) {
  return __float2half_rn(x);
}

}  // namespace cast::cuda
