// Products of a warp, by mma.sync: 16 rows of a tile in registers against rows or columns of another in shared memory.
#pragma once
#include "tile.cuh"

namespace cast::cuda {

// acc[16 x 8] += A[16 x 16] B[16 x 8]
template <class T>
CAST_DEVICE void multiply(float* acc, const uint32_t* a, const uint32_t* b) {
  if constexpr (IS_BF16<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The fragments of a warp's 16 rows of a tile, `channel` on: the left operand of a product.
template <int WIDTH>
CAST_DEVICE void left_operand(uint32_t (&a)[WIDTH / 4], uint32_t tile, int line, int channel, int lane) {
#pragma unroll
  for (int c = 0; c < WIDTH / 16; ++c)
    load_matrices(a + 4 * c, tile + swizzled(line + lane % 16, channel / 8 + 2 * c + lane / 16));
}

// acc[16 x 16] += a[16 x WIDTH] (rows `line` to `line` + 15 of a tile)'
template <class T, int WIDTH>
CAST_DEVICE void multiply_rows(float (*acc)[4], const uint32_t* a, uint32_t tile, int line, int channel, int lane) {
#pragma unroll
  for (int c = 0; c < WIDTH / 16; ++c) {
    uint32_t b[4];
    const int matrix = lane / 8;
    load_matrices(b, tile + swizzled(line + 8 * (matrix / 2) + lane % 8, channel / 8 + 2 * c + matrix % 2));
    multiply<T>(acc[0], a + 4 * c, b);
    multiply<T>(acc[1], a + 4 * c, b + 2);
  }
}

// acc[16 x WIDTH] += a[16 x 16] (rows `line` to `line` + 15 of a tile)
template <class T, int WIDTH>
CAST_DEVICE void multiply_columns(float (*acc)[4], const uint32_t* a, uint32_t tile, int line, int channel, int lane) {
#pragma unroll
  for (int c = 0; c < WIDTH / 16; ++c) {
    uint32_t b[4];
    const int matrix = lane / 8;
    load_matrices_transposed(b, tile + swizzled(line + 8 * (matrix % 2) + lane % 8, channel / 8 + 2 * c + matrix / 2));
    multiply<T>(acc[2 * c], a, b);
    multiply<T>(acc[2 * c + 1], a, b + 2);
  }
}

// 16 columns of an accumulator as a left operand.
template <class T>
CAST_DEVICE void as_operand(uint32_t (&a)[4], const float (*acc)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack<T>(acc[i / 2][2 * (i % 2)], acc[i / 2][2 * (i % 2) + 1]);
}

}  // namespace cast::cuda
