// wgmma: the products of warpgroups, and what the checks remember of their operands in shared memory.
#pragma once

#include "checks.h"
#include "matrix.h"

namespace ptx::PTX_LEVEL {

constexpr int kRows = 64, kMostColumns = 256, kMostDepth = 16, kChunk = 16;

// Products of every active warpgroup of a batch. Its layout is known to native/products.py.
struct Product {
  i64 groups, columns, depth, kind, negative;  // groups: of a CTA; kind: 0 bf16, 1 f16, 2 tf32
  // Operands: addresses of their 16-byte chunks, a row for each descriptor, and the row of each group; major: whether
  // consecutive rows are adjacent. A may come from four registers instead.
  const i32 *a_chunks, *a_row, *a_registers;
  i64 a_count, a_major;
  const i32 *b_chunks, *b_row;
  i64 b_count, b_major;
  const u8 *active, *keep;  // [CTAs][groups]; keep: whether `old` is added
  const float* old;  // [CTAs][groups][64][columns]; null where nothing is added and everyone is active
  float* out;
};

typedef u16 u16x8 __attribute__((vector_size(16)));
typedef u32 u32x8 __attribute__((vector_size(32)));

// The elements of an operand's 16-byte chunk as floats, side by side.
template <int Kind>
inline void decode_chunk(const u8* chunk, float* out) {
  if (Kind == 0) {
    store_vector(out, __builtin_convertvector(load_vector<u16x8>(chunk), u32x8) << 16);
  } else if (Kind == 1) {
    for (int e = 0; e < 8; ++e) out[e] = F16::up(load_at<u16>(chunk + 2 * e));
  } else {
    for (int e = 0; e < 4; ++e) out[e] = MmaTf32::half(load_at<u32>(chunk + 4 * e), 0);
  }
}

// A of 64 rows by `depth`, as out[k][row]. In memory a chunk holds consecutive k of a row, or consecutive rows (major).
template <int Kind>
inline void decode_a(const u8* shared, const i32* chunks, i64 depth, i64 major, float (*out)[kRows]) {
  constexpr int each = Kind == 2 ? 4 : 8;
  if (major) {
    for (i64 k = 0; k < depth; ++k)
      for (int r = 0; r < kRows; r += each) decode_chunk<Kind>(shared + *chunks++, out[k] + r);
    return;
  }
  for (int r = 0; r < kRows; ++r)
    for (i64 k = 0; k < depth; k += each) {
      float values[8];
      decode_chunk<Kind>(shared + *chunks++, values);
      for (int e = 0; e < each; ++e) out[k + e][r] = values[e];
    }
}

// B's chunks one after the other: [column][k], or [k][column] (major).
template <int Kind>
inline void decode_b(const u8* shared, const i32* chunks, i64 count, float* out) {
  constexpr int each = Kind == 2 ? 4 : 8;
  for (i64 i = 0; i < count; ++i) decode_chunk<Kind>(shared + chunks[i], out + each * i);
}

// A from registers: lane 4g + q of a warp holds, in register r, row g + 8 (r % 2) of its sixteen; k runs over (r / 2, q, half).
template <class E>
inline void decode_registers(const Cta& c, const Product& p, i64 group, float (*a)[kRows]) {
  for (int r = 0; r < 4; ++r)
    for (int w = 0; w < 4; ++w) {
      const u32* from = c.at<u32>(p.a_registers[r]) + 128 * group + kWarp * w;
      const u32x16 x = load_vector<u32x16>(from), y = load_vector<u32x16>(from + 16);
      u32 lanes[4][8];  // [q][g]
      store_vector(lanes[0], __builtin_shufflevector(x, y, 0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29));
      store_vector(lanes[2], __builtin_shufflevector(x, y, 2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31));
      for (int q = 0; q < 4; ++q)
        for (int h = 0; h < E::halves; ++h) {
          float* to = a[(r / 2 * 4 + q) * E::halves + h] + 16 * w + 8 * (r % 2);
          for (int g = 0; g < 8; ++g) to[g] = E::half(lanes[q][g], h);
        }
    }
}

// What becomes of sixteen sums of a column: `before` is added after them, where something is to be kept.
inline v16 finished(v16 sum, bool negative, bool keep, v16 before) {
  if (negative) sum = -sum;
  return v16(canonical(keep ? sum + before : sum));
}

// How many columns and sixteens of rows are summed at once: as many as there are registers for.
#if defined(__AVX512F__)
constexpr int kColumnsAtOnce = 4, kSixteensAtOnce = 4;
#else
constexpr int kColumnsAtOnce = 2, kSixteensAtOnce = 2;
#endif

// Sums over k of a[k][row] * b[column * column_stride + k * k_stride], in the order of k, for a block of columns and rows.
inline void multiply_block(const float* a, const float* b, i64 column_stride, i64 k_stride, i64 depth,
                           v16 (*sums)[kSixteensAtOnce]) {
  v16 s[kColumnsAtOnce][kSixteensAtOnce] = {};
  for (i64 k = 0; k < depth; ++k) {
    v16 rows[kSixteensAtOnce];
    PTX_UNROLL for (int r = 0; r < kSixteensAtOnce; ++r) rows[r] = load_vector<v16>(a + k * kRows + 16 * r);
    PTX_UNROLL for (int j = 0; j < kColumnsAtOnce; ++j) {
      const v16 factor = broadcast(b[j * column_stride + k * k_stride]);
      PTX_UNROLL for (int r = 0; r < kSixteensAtOnce; ++r) s[j][r] = multiply_add(rows[r], factor, s[j][r]);
    }
  }
  PTX_UNROLL for (int j = 0; j < kColumnsAtOnce; ++j) PTX_UNROLL for (int r = 0; r < kSixteensAtOnce; ++r) sums[j][r] =
      s[j][r];
}

// One group's product. Transposed: `old` and `out` are [column][row], else [row][column].
template <bool Transposed>
inline void run_product(const Cta& c, const Product& p, i64 group, const u8* shared) {
  alignas(64) float a[kMostDepth][kRows], b[kMostDepth * kMostColumns];
  const i64 at = c.cta * p.groups + group, size = kRows * p.columns;
  const i32* a_chunks = p.a_registers ? nullptr : p.a_chunks + p.a_row[at] * p.a_count;
  const i32* b_chunks = p.b_chunks + p.b_row[at] * p.b_count;
  const i64 count = p.columns * p.depth / (p.kind == 2 ? 4 : 8);
  if (p.kind == 0) {
    a_chunks ? decode_a<0>(shared, a_chunks, p.depth, p.a_major, a) : decode_registers<MmaBf16>(c, p, group, a);
    decode_b<0>(shared, b_chunks, count, b);
  } else if (p.kind == 1) {
    a_chunks ? decode_a<1>(shared, a_chunks, p.depth, p.a_major, a) : decode_registers<MmaF16>(c, p, group, a);
    decode_b<1>(shared, b_chunks, count, b);
  } else {
    a_chunks ? decode_a<2>(shared, a_chunks, p.depth, p.a_major, a) : decode_registers<MmaTf32>(c, p, group, a);
    decode_b<2>(shared, b_chunks, count, b);
  }
  const bool keep = p.keep[at] != 0;
  const float* old = p.old ? p.old + at * size : nullptr;
  float* out = p.out + at * size;
  const i64 column_stride = p.b_major ? 1 : p.depth, k_stride = p.b_major ? p.columns : 1;
  for (i64 column = 0; column < p.columns; column += kColumnsAtOnce)
    for (int row = 0; row < kRows; row += 16 * kSixteensAtOnce) {
      v16 sums[kColumnsAtOnce][kSixteensAtOnce];
      multiply_block(&a[0][row], b + column * column_stride, column_stride, k_stride, p.depth, sums);
      for (int j = 0; j < kColumnsAtOnce; ++j)
        for (int r = 0; r < kSixteensAtOnce; ++r) {
          const i64 first = row + 16 * r;
          if (Transposed) {
            float* to = out + (column + j) * kRows + first;
            store_vector(to, finished(sums[j][r], p.negative != 0, keep, load_vector<v16>(to)));
            continue;
          }
          v16 before = {};
          for (int i = 0; keep && i < 16; ++i) before[i] = old[(first + i) * p.columns + column + j];
          const v16 value = finished(sums[j][r], p.negative != 0, keep, before);
          for (int i = 0; i < 16; ++i) out[(first + i) * p.columns + column + j] = value[i];
        }
    }
}

// Granules of an operand's chunks, in Checker's words: `first` of each chunk, `many` a chunk.
struct Operand {
  i64 count, many;
  const i32* first;
  i32* operand;  // [CTAs][granules]
  i16* operands;
  const i32* fence;  // [CTAs][warps]
};

class Operands {
 public:
  Operands(Cta& cta, const Op& instruction, const Operand& of, i64 group)
      : c(cta), op(instruction), o(of), tags(cta.tags()), floor(cta.floor), leader(int(4 * group)) {
    warps = cta.n / kWarp;
    seen = cta.b.seen + cta.cta * warps * warps;
    operand = of.operand + cta.cta * cta.b.granules;
    operands = of.operands + cta.cta * cta.b.granules;
    fence = of.fence + cta.cta * warps;
  }

  // A product begins to read them.
  void read(i32 step) {
    const i32 now = i32(u32(step) << kWarpBits) | leader;
    i32 fenced = 0;
    for (int w = 0; w < 4; ++w) fenced = fence[leader + w] > fenced ? fence[leader + w] : fenced;
    const i32 known = fenced < floor >> kWarpBits ? i32(u32(fenced) << kWarpBits) | kWarpMask : floor;
    const i32x16 limit = {known, INT32_MAX, INT32_MAX, 0, known, INT32_MAX, INT32_MAX, 0,
                          known, INT32_MAX, INT32_MAX, 0, known, INT32_MAX, INT32_MAX, 0};
    for (i64 k = 0; k < o.count; ++k) {
      const i64 first = o.first[k];
      for (i64 g = first; o.many % 4 == 0 && g < first + o.many; g += 4) {
        if (any(load_vector<i32x16>(tags + g) > limit))
          for (i64 one = g; one < g + 4; ++one) look(one, fenced);
        store_vector(operand + g, i32x4{now, now, now, now});
        store_vector(operands + g, load_vector<i16x4>(operands + g) + i16(1));
      }
      for (i64 g = first; o.many % 4 && g < first + o.many; ++g) {
        look(g, fenced);
        operand[g] = now;
        ++operands[g];
      }
    }
  }

  // The warpgroup knows that they have been read.
  // Each warp in turn: the first is the reader if there is none, the last other than the reader is the second.
  void were_read(i32 step) {
    const i32 now = i32(u32(step) << kWarpBits);
    const i32 third = now | (leader + 2), fourth = now | (leader + 3);
    const i32x16 reader = {0, -1, 0, 0, 0, -1, 0, 0, 0, -1, 0, 0, 0, -1, 0, 0};
    const i32x16 reader_too = {0, 0, -1, 0, 0, 0, -1, 0, 0, 0, -1, 0, 0, 0, -1, 0};
    for (i64 k = 0; k < o.count; ++k) {
      const i64 first = o.first[k];
      for (i64 g = first; o.many % 4 == 0 && g < first + o.many; g += 4) {
        store_vector(operands + g, load_vector<i16x4>(operands + g) - i16(1));
        i32x16 t = load_vector<i32x16>(tags + g);
        const i32x16 fresh = (t <= floor) & reader;
        t = (fresh & (now | leader)) | (~fresh & t);
        const i32x16 readers = __builtin_shufflevector(t, t, 1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9, 13, 13, 13, 13);
        const i32x16 last = (readers & kWarpMask) == leader + 3;
        const i32x16 other = (last & third) | (~last & fourth);
        store_vector(tags + g, (reader_too & other) | (~reader_too & t));
      }
      for (i64 g = first; o.many % 4 && g < first + o.many; ++g) {
        --operands[g];
        if (tags[g].reader <= floor) tags[g].reader = now | leader;
        tags[g].reader_too = (tags[g].reader & kWarpMask) == leader + 3 ? third : fourth;
      }
    }
  }

 private:
  void look(i64 g, i32 fenced) {
    const i32 tag = tags[g].writer;
    const int by = (tag & kWarpMask) < warps ? tag & kWarpMask : warps - 1;
    for (int w = leader; tag > floor && w < leader + 4; ++w) {
      if ((tag & kWarpMask) == w || (tag >> kWarpBits) <= seen[w * warps + by]) continue;
      report(c, op, kReadByProduct, tag, g, w);
      break;
    }
    if (tags[g].flight > 0) report(c, op, kProductReadsFlight, tags[g].flight, g, leader);
    const i32 known = fence[by] > fenced ? fence[by] : fenced;
    if ((tag >> kWarpBits) > known) report(c, op, kProductUnfenced, tag, g, leader);
  }

  Cta& c;
  const Op& op;
  const Operand& o;
  Tags* tags;
  i32 floor;
  int leader, warps;
  const i32 *seen, *fence;
  i32* operand;
  i16* operands;
};

}  // namespace ptx::PTX_LEVEL
