// ldmatrix, stmatrix and mma: matrices spread over the registers of a warp. The layouts are in matrix.py and mma.py.
#pragma once

#include "floating.h"
#include "memory.h"
#include "vector.h"

namespace ptx::PTX_LEVEL {

constexpr i64 kRowBytes = 16;

// Whether no warp has both active and inactive threads.
inline bool whole_warps(const Cta& c, const u8* mask) {
  for (int w = 0; mask != nullptr && w < c.n / kWarp; ++w) {
    const u32 lanes = lanes_of(mask, w);
    if (lanes != 0 && lanes != 0xFFFFFFFFu) return false;
  }
  return true;
}

// Row addresses of every thread, and the access by the threads that give one.
inline bool rows_of(Cta& c, const Op& op, const u8* mask, int way, i32* rows, Access& access) {
  i64 address[kMostThreads];
  u8 givers[kMostThreads];
  if (!whole_warps(c, mask)) return false;
  effective(c, op, 0, address);
  for (int t = 0; t < c.n; ++t) givers[t] = u8(active(mask, t) && t % kWarp < 8 * op.a[4]);
  if (!shared_inside(c, address, givers, kRowBytes)) return false;
  for (int t = 0; t < c.n; ++t) rows[t] = i32(address[t]);
  count_shared(c, way, rows, givers, kRowBytes);
  collect(c, rows, givers, kRowBytes, access);
  return true;
}

// a: 0..3 the address, 4 the number of matrices, 5 the list of registers, 6 whether they are transposed.
inline bool load_matrix(Cta& c, const Op& op, const u8* mask) {
  i32 rows[kMostThreads];
  Access access;
  if (!rows_of(c, op, mask, kSharedLoadWavefronts, rows, access)) return false;
  if (c.b.checks) Checks(c, op).read(access);
  const u8* shared = c.shared();
  for (int j = 0; j < op.a[4]; ++j) {
    u32* out = c.at<u32>(c.list(op.a[5])[j]);
    for (int w = 0; w < c.n; w += kWarp) {
      if (!active(mask, w)) continue;
      const i32* row = rows + w + 8 * j;
      if (!op.a[6]) {
        for (int r = 0; r < 8; ++r) std::memcpy(out + w + 4 * r, shared + row[r], size_t(kRowBytes));
        continue;
      }
      u16 whole[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(whole[r], shared + row[r], size_t(kRowBytes));
      for (int l = 0; l < kWarp; ++l)
        out[w + l] = u32(whole[2 * (l % 4)][l / 4]) | u32(whole[2 * (l % 4) + 1][l / 4]) << 16;
    }
  }
  return true;
}

inline bool store_matrix(Cta& c, const Op& op, const u8* mask) {
  i32 rows[kMostThreads];
  Access access;
  if (!rows_of(c, op, mask, kSharedStoreWavefronts, rows, access)) return false;
  u8* shared = c.shared();
  // The row that a thread gives the address of, as it will be.
  const auto content = [&](int thread, u16* row) {
    const int warp = thread & ~31, j = (thread & 31) / 8, r = thread & 7;
    const u32* value = c.at<u32>(c.list(op.a[5])[j]) + warp;
    if (op.a[6]) {
      for (int p = 0; p < 8; ++p) row[p] = u16(value[4 * p + r / 2] >> (16 * (r % 2)));
    } else {
      std::memcpy(row, value + 4 * r, size_t(kRowBytes));
    }
  };
  const auto differs = [&](int i) {
    u16 row[8];
    content(access.thread[i], row);
    return std::memcmp(shared + access.address[i], row, size_t(kRowBytes)) ? 2 : 0;
  };
  Checks checks(c, op);
  if (c.b.checks) checks.write(access, differs);
  for (int i = 0; i < access.count; ++i) {
    u16 row[8];
    content(access.thread[i], row);
    std::memcpy(shared + access.address[i], row, size_t(kRowBytes));
  }
  if (c.b.checks) checks.wrote(access, differs);
  return true;
}

struct MmaBf16 {
  static constexpr int halves = 2;
  static float half(u32 a, int which) { return float_of(which ? a & 0xFFFF0000u : a << 16); }
};
struct MmaF16 {
  static constexpr int halves = 2;
  static float half(u32 a, int which) { return F16::up(u16(which ? a >> 16 : a)); }
};
struct MmaTf32 {
  static constexpr int halves = 1;
  static float half(u32 a, int) { return float_of(a & 0xFFFFE000u); }
};

// Sixteen lanes of four quads, each with the value that lane T of the quad has.
template <int T>
inline v16 of_quad(v16 a) {
  return __builtin_shufflevector(a, a, T, T, T, T, 4 + T, 4 + T, 4 + T, 4 + T, 8 + T, 8 + T, 8 + T, 8 + T, 12 + T,
                                 12 + T, 12 + T, 12 + T);
}

typedef float v4 __attribute__((vector_size(16)));

inline v16 four_times(v4 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3); }

// Rows of four, `stride` floats apart, as columns.
inline void transpose_four(const float* rows, int stride, v4* columns) {
  v4 r[4];
  for (int i = 0; i < 4; ++i) r[i] = load_vector<v4>(rows + i * stride);
  const v4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const v4 c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  columns[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  columns[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  columns[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  columns[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// The sums of a warp: [register of C][half of the warp].
struct Sums {
  v16 c[4][2];
  // a: rows 0 to 7 and 8 to 15, by half of the warp; b: the columns 2t, and 2t + 1, of row k of B.
  template <int T>
  void add(const v16 (*a)[2], const v4 (*b)[4]) {
    const v16 even = four_times(b[0][T]), odd = four_times(b[1][T]);
    for (int h = 0; h < 2; ++h) {
      const v16 upper = of_quad<T>(a[0][h]), lower = of_quad<T>(a[1][h]);
      c[0][h] = multiply_add(upper, even, c[0][h]);
      c[1][h] = multiply_add(upper, odd, c[1][h]);
      c[2][h] = multiply_add(lower, even, c[2][h]);
      c[3][h] = multiply_add(lower, odd, c[3][h]);
    }
  }
};

template <class E>
inline void unpack_lanes(const u32* from, int half, float* out) {
  for (int l = 0; l < kWarp; ++l) out[l] = E::half(from[l], half);
}

// Lane l = 4g + t: register r of A holds row g + 8 (r % 2), and B's column g; C's register i holds row g + 8 (i / 2), column
// 2t + i % 2. k runs over (register, half, t), as in mma.py.
// a: 0 the list of 4 targets, of A's, of B's, and of C's registers, 1 the counter of this kind. A: registers of A, B: of B.
template <class E, int A, int B>
bool multiply(Cta& c, const Op& op, const u8* mask) {
  static_assert(A == 2 * B, "A has twice the rows of B");
  if (!whole_warps(c, mask)) return false;
  const i32* list = c.list(op.a[0]);
  i64 warps = 0;
  for (int w = 0; w < c.n; w += kWarp) {
    if (!active(mask, w)) continue;
    ++warps;
    Sums sums = {};
    for (int r = 0; r < B; ++r)
      for (int h = 0; h < E::halves; ++h) {
        alignas(64) float lanes[kWarp];
        v16 a[2][2];
        v4 b[2][4];
        for (int row = 0; row < 2; ++row) {
          unpack_lanes<E>(c.at<u32>(list[4 + 2 * r + row]) + w, h, lanes);
          a[row][0] = load_vector<v16>(lanes);
          a[row][1] = load_vector<v16>(lanes + 16);
        }
        unpack_lanes<E>(c.at<u32>(list[4 + A + r]) + w, h, lanes);
        for (int p = 0; p < 2; ++p) transpose_four(lanes + 4 * p, 8, b[p]);
        sums.add<0>(a, b);
        sums.add<1>(a, b);
        sums.add<2>(a, b);
        sums.add<3>(a, b);
      }
    for (int i = 0; i < 4; ++i)
      for (int h = 0; h < 2; ++h)
        sums.c[i][h] = sums.c[i][h] + load_vector<v16>(c.at<float>(list[4 + A + B + i]) + w + 16 * h);
    for (int i = 0; i < 4; ++i)
      for (int h = 0; h < 2; ++h) store_vector(c.at<u32>(list[i]) + w + 16 * h, canonical(sums.c[i][h]));
  }
  c.b.counters[op.a[1]] += warps * 2 * 16 * 8 * 4 * B * E::halves;
  return true;
}

}  // namespace ptx::PTX_LEVEL
