// Tiles of 64 rows of 128 bytes under the 128-byte swizzle: 64 numbers of 16 bits or 32 of 32 a row.
//
// A thread holds of its rows what wgmma's accumulator gives it: rows `row` and `row + 8`, columns 2 (lane % 4) and the
// next of every eight. Its accesses to a tile have no bank conflicts: eight rows lie in eight different 16-byte chunks.
#pragma once
#include "numbers.cuh"

namespace cast::cuda {

constexpr int TILE_ROWS = 64, LINE_BYTES = 128, TILE_BYTES = TILE_ROWS * LINE_BYTES;

template <class T>
constexpr int TILE_COLUMNS = LINE_BYTES / sizeof(T);

// Which rows and columns of a warpgroup's tile are this thread's.
struct Place {
  int lane, row, column;  // row in the tile, the first of two; column of the first of two numbers, of every eight

  CAST_DEVICE explicit Place(int thread)
      : lane(thread % 32), row(16 * (thread / 32) + lane / 4), column(2 * (lane % 4)) {}
};

CAST_DEVICE uint32_t swizzled(int row, int chunk) { return row * LINE_BYTES + ((chunk ^ (row % 8)) << 4); }

// Address of two neighbouring 16-bit numbers, columns 8 j + place.column, in row place.row + 8 r.
CAST_DEVICE uint32_t pair_of_16(uint32_t tile, const Place& place, int j, int r) {
  return tile + swizzled(place.row + 8 * r, j) + 2 * place.column;
}
// The same of 32-bit numbers.
CAST_DEVICE uint32_t pair_of_32(uint32_t tile, const Place& place, int j, int r) {
  return tile + swizzled(place.row + 8 * r, 2 * j + place.column / 4) + 4 * (place.column % 4);
}

template <class T>
CAST_DEVICE float2 load_pair(uint32_t tile, const Place& place, int j, int r) {
  if constexpr (sizeof(T) == 4) {
    return load_shared_float2(pair_of_32(tile, place, j, r));
  } else {
    return unpack<T>(load_shared_word(pair_of_16(tile, place, j, r)));
  }
}

CAST_DEVICE void store_pair(uint32_t tile, const Place& place, int j, int r, float2 v) {
  store_shared_float2(pair_of_32(tile, place, j, r), v);
}
CAST_DEVICE void store_pair(uint32_t tile, const Place& place, int j, int r, uint32_t packed) {
  store_shared_word(pair_of_16(tile, place, j, r), packed);
}

// Two numbers as a tile of T holds them.
template <class T>
CAST_DEVICE auto as_pair(float first, float second) {
  if constexpr (sizeof(T) == 4) {
    return make_float2(first, second);
  } else {
    return pack<T>(first, second);
  }
}

// Sum over a row: the four threads that share it hold the parts.
CAST_DEVICE float sum_of_row(float part) {
  part += __shfl_xor_sync(~0u, part, 1);
  return part + __shfl_xor_sync(~0u, part, 2);
}

// The operand of wgmma, 64 columns of this thread's rows: four fragments.
CAST_DEVICE void load_fragments(uint32_t* a, uint32_t tile, int warp, const Place& place) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
    load_matrices(a + 4 * k, tile + swizzled(16 * warp + place.lane % 16, 2 * k + place.lane / 16));
}

// One tile of T from two of float32, rounded; each thread takes its own rows and columns.
template <class T>
CAST_DEVICE void round_tile(uint32_t to, uint32_t from, const Place& place) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 v = load_pair<float>(from + j / 4 * TILE_BYTES, place, j % 4, r);
      store_pair(to, place, j, r, pack<T>(v.x, v.y));
    }
}

}  // namespace cast::cuda
