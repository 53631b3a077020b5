// Products of a warpgroup: acc[64 x 192] += A[64 x 16] B[192 x 16]', B in shared memory, A there or in registers.
#pragma once
#include "numbers.cuh"

namespace cast::cuda {

// Weight rows that one product multiplies: the columns of its accumulator.
constexpr int PRODUCT_COLUMNS = 192;

CAST_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
CAST_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
CAST_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// acc = 0, here and not later: a register may not be written between `products_begin` and its product.
template <int COUNT>
CAST_DEVICE void clear(float (&acc)[COUNT]) {
#pragma unroll
  for (float& v : acc) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(v));
}

// Descriptor of a tile of 16-bit rows along k, under the 128-byte swizzle: eight rows of 128 bytes are 1024 bytes.
// Adding 2 moves on by 16 numbers along k.
CAST_DEVICE uint64_t rows_along_k(const void* tile) {
  return uint64_t(shared_address(tile) & 0x3FFFF) >> 4 | uint64_t(1) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}

// Descriptor of tiles whose rows run along k: 64 columns each, the next 64 columns one tile on. Adding 128 moves on by 16
// rows.
CAST_DEVICE uint64_t columns_along_k(const void* tile, uint32_t tile_bytes) {
  return uint64_t(shared_address(tile) & 0x3FFFF) >> 4 | uint64_t(tile_bytes >> 4) << 16 | uint64_t(64) << 32 |
         uint64_t(1) << 62;
}

#define CAST_FOUR(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define CAST_SIXTEEN(i) CAST_FOUR(i), CAST_FOUR(i + 4), CAST_FOUR(i + 8), CAST_FOUR(i + 12)
#define CAST_PRODUCT(TYPE, A, ...) \
  asm volatile( \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
      "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, " A ";" \
      : CAST_SIXTEEN(0), CAST_SIXTEEN(16), CAST_SIXTEEN(32), CAST_SIXTEEN(48), CAST_SIXTEEN(64), CAST_SIXTEEN(80) \
      : __VA_ARGS__)
#define CAST_FROM_REGISTERS(TYPE) \
  CAST_PRODUCT(TYPE, "{%96, %97, %98, %99}, %100, 1, 1, 1, 0", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define CAST_FROM_SHARED(TYPE) CAST_PRODUCT(TYPE, "%96, %97, 1, 1, 1, 0, 0", "l"(a), "l"(b))

// Register 4j + 2r + i of thread t of warp w: row 16w + t / 4 + 8r, column 8j + 2 (t % 4) + i. The fragment a holds two
// columns a register: 2 (t % 4) of row t / 4, then of row t / 4 + 8, then the same eight columns on.
template <class T>
CAST_DEVICE void product(float (&acc)[PRODUCT_COLUMNS / 2], const uint32_t* a, uint64_t b) {
  if constexpr (IS_BF16<T>) {
    CAST_FROM_REGISTERS("bf16");
  } else {
    CAST_FROM_REGISTERS("f16");
  }
}
template <class T>
CAST_DEVICE void product(float (&acc)[PRODUCT_COLUMNS / 2], uint64_t a, uint64_t b) {
  if constexpr (IS_BF16<T>) {
    CAST_FROM_SHARED("bf16");
  } else {
    CAST_FROM_SHARED("f16");
  }
}

// acc[64 x 192] += A[16 x 64]' B[16 x 192], both stored with their rows along k.
template <class T>
CAST_DEVICE void product_of_columns(float (&acc)[PRODUCT_COLUMNS / 2], uint64_t a, uint64_t b) {
  if constexpr (IS_BF16<T>) {
    CAST_PRODUCT("bf16", "%96, %97, 1, 1, 1, 1, 1", "l"(a), "l"(b));
  } else {
    CAST_PRODUCT("f16", "%96, %97, 1, 1, 1, 1, 1", "l"(a), "l"(b));
  }
}

#undef CAST_FROM_SHARED
#undef CAST_FROM_REGISTERS
#undef CAST_PRODUCT
#undef CAST_SIXTEEN
#undef CAST_FOUR

}  // namespace cast::cuda
