// What kernels are given: one struct a kernel, the same type on both sides. Plain C++, for nvcc and for the host.
#pragma once
#include <cstdint>

namespace cast::cuda {

// What cuTensorMapEncodeTiled makes, aligned as CUDA 13 has it.
struct alignas(128) TensorMap {
  unsigned char bytes[128];
};

// Dynamic shared memory of a CTA; the kernels check that it is what they lay out.
constexpr int ROW_SHARED = 107'520, ATTENTION_SHARED = 40'960, ATTENTION_BACKWARD_SHARED = 69'632;

}  // namespace cast::cuda
