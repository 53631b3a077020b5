// What kernels are given: one struct a kernel, the same type on both sides. Plain C++, for nvcc and for the host.
#pragma once
#include <cstdint>

namespace cast::cuda {

// What cuTensorMapEncodeTiled makes.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

}  // namespace cast::cuda
