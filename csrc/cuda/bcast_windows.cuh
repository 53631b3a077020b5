// What attention and its gradient share: tokens in window order, tiles of them in shared memory, products of a warp.
//
// A CTA of four warps takes 64 tokens of one clip and 64 channels, which are 4, 2 or 1 heads. A tile holds whole windows
// where they fit; of longer windows it has 64 tokens of one.
#pragma once
#include "bcast_arguments.h"
#include "tile.cuh"

namespace cast::cuda {

constexpr int ATTENTION_THREADS = 128, CHANNELS = 64, BLOCK = 64;

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

// The rows of a stream in window order: token i of a clip -> row of the stream.
struct WindowOrder {
  int clip, frames, patches, in_time;

  CAST_DEVICE int row(int i, Tokens tokens) const {
    const int frame = in_time ? i % frames : i / patches, patch = in_time ? i / frames : i % patches;
    return (clip * frames + frame) * tokens.frame_rows + tokens.cls + patch;
  }
};

// Tokens of a clip in window order: those of a tile, and those that its windows hold.
struct Span {
  int first, end, window_begin, window_end;

  template <class Way>
  CAST_DEVICE Span(const Way& way, int number, int clip_rows) {
    const int held = way.tiles_of_window == 1 ? way.tile_queries : way.window;
    window_begin = number / way.tiles_of_window * held;
    window_end = min(window_begin + held, clip_rows);
    first = window_begin + number % way.tiles_of_window * BLOCK;
    end = min(first + BLOCK, window_end);
  }
};

// What a warp's 16 tokens from `line` of a tile on see: the tokens of their windows.
struct Sight {
  int from, to;

  CAST_DEVICE Sight(const Span& span, int line, int window) {
    const int first = min(span.first + line, span.end - 1), last = min(span.first + line + 15, span.end - 1);
    from = first / window * window;
    to = last / window * window + window;
  }
  // Whether any of so many tokens from `token` on is seen.
  CAST_DEVICE bool sees(int token, int count) const { return token < to && token + count > from; }
};

// 64 rows of 64 channels to shared memory, those from `end` on as zero. Each thread brings half of a row.
template <class T>
CAST_DEVICE void bring(unsigned char* to, const T* from, int stride, int first, int end, const WindowOrder& order,
                       Tokens tokens) {
  const int line = threadIdx.x / 2, i = first + line;
  const T* source = from + int64_t(i < end ? order.row(i, tokens) : 0) * stride;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int chunk = threadIdx.x % 2 * 4 + c;
    copy_16(to + swizzled(line, chunk), source + 8 * chunk, i < end ? 16 : 0);
  }
}

// The fragments of a warp's 16 rows of a tile, `channel` on: the left operand of a product.
template <int HEAD>
CAST_DEVICE void left_operand(uint32_t (&a)[HEAD / 4], uint32_t tile, int line, int channel, int lane) {
#pragma unroll
  for (int c = 0; c < HEAD / 16; ++c)
    load_matrices(a + 4 * c, tile + swizzled(line + lane % 16, channel / 8 + 2 * c + lane / 16));
}

// acc[16 x 16] += a[16 x HEAD] (rows `line` to `line` + 15 of a tile)'
template <class T, int HEAD>
CAST_DEVICE void multiply_rows(float (*acc)[4], const uint32_t* a, uint32_t tile, int line, int channel, int lane) {
#pragma unroll
  for (int c = 0; c < HEAD / 16; ++c) {
    uint32_t b[4];
    const int matrix = lane / 8;
    load_matrices(b, tile + swizzled(line + 8 * (matrix / 2) + lane % 8, channel / 8 + 2 * c + matrix % 2));
    multiply<T>(acc[0], a + 4 * c, b);
    multiply<T>(acc[1], a + 4 * c, b + 2);
  }
}

// acc[16 x HEAD] += a[16 x 16] (rows `line` to `line` + 15 of a tile)
template <class T, int HEAD>
CAST_DEVICE void multiply_columns(float (*acc)[4], const uint32_t* a, uint32_t tile, int line, int channel, int lane) {
#pragma unroll
  for (int c = 0; c < HEAD / 16; ++c) {
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

// Rows of CLS are zero: they go through products whose results nobody reads, and would carry what memory held before.
template <class T>
CAST_DEVICE void zero_cls(T* rows, int stride, int first, int frames, Tokens tokens) {
  const int frame = first + threadIdx.x / 2;
  if (frame >= frames) return;
  uint4* to = reinterpret_cast<uint4*>(rows + int64_t(frame) * tokens.frame_rows * stride) + threadIdx.x % 2 * 4;
#pragma unroll
  for (int c = 0; c < 4; ++c) to[c] = make_uint4(0, 0, 0, 0);
}

}  // namespace cast::cuda
