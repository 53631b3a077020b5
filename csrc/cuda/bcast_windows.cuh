// What attention and its gradient share: tokens in window order, and tiles of them in shared memory.
//
// A CTA of four warps takes 64 tokens of one clip and 64 channels, which are 4, 2 or 1 heads. A tile holds whole windows
// where they fit; of longer windows it has 64 tokens of one.
#pragma once
#include "bcast_arguments.h"
#include "mma.cuh"

namespace cast::cuda {

constexpr int ATTENTION_THREADS = 128, CHANNELS = 64, BLOCK = 64;

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

// What a warp's 16 tokens from `line` of a tile on see: the tokens of their windows, nothing where there is no token.
struct Sight {
  int from, to, all_from, all_to;  // what one of them sees, what all of them do

  CAST_DEVICE Sight(const Span& span, int line, int window) : from(0), to(0), all_from(0), all_to(0) {
    if (span.first + line >= span.end) return;
    const int last = min(span.first + line + 15, span.end - 1);
    from = (span.first + line) / window * window;
    all_from = last / window * window;
    to = all_from + window;
    all_to = from + window;
  }
  // Whether any of so many tokens from `token` on is seen.
  CAST_DEVICE bool sees(int token, int count) const { return token < to && token + count > from; }
  // Whether each of them is seen by each token of the warp.
  CAST_DEVICE bool sees_all(int token, int count) const { return token >= all_from && token + count <= all_to; }
};

// 64 rows of 64 channels to shared memory, those from `end` on as zero. Each thread brings half of a row.
template <class T>
CAST_DEVICE void bring(unsigned char* to, const T* from, int stride, int first, int end, const WindowOrder& order,
                       Tokens tokens) {
  const int line = threadIdx.x / 2, i = first + line;
  const T* source = from + int64_t(i < end ? order.row(i, tokens) : 0) * stride;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int chunk = 2 * (c ^ line % 2 * 2) + threadIdx.x % 2;  // two threads have a sector, eight all banks
    copy_16(to + swizzled(line, chunk), source + 8 * chunk, i < end ? 16 : 0);
  }
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
