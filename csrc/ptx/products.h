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

// A chunk's elements as floats, `stride` apart.
inline void decode_chunk(const u8* chunk, i64 kind, float* out, i64 stride) {
  if (kind == 2) {
    for (int e = 0; e < 4; ++e) out[e * stride] = MmaTf32::half(load_at<u32>(chunk + 4 * e), 0);
  } else if (kind == 1) {
    for (int e = 0; e < 8; ++e) out[e * stride] = F16::up(load_at<u16>(chunk + 2 * e));
  } else {
    for (int e = 0; e < 8; ++e) out[e * stride] = Bf16::up(load_at<u16>(chunk + 2 * e));
  }
}

// An operand of `rows` by `depth`, element (row, k) at row * row_stride + k * k_stride.
inline void decode_operand(const u8* shared, const i32* chunks, i64 rows, i64 depth, i64 major, i64 kind, float* out,
                           i64 row_stride, i64 k_stride) {
  const i64 each = kind == 2 ? 4 : 8;
  if (major) {
    for (i64 k = 0; k < depth; ++k)
      for (i64 r = 0; r < rows; r += each)
        decode_chunk(shared + *chunks++, kind, out + r * row_stride + k * k_stride, row_stride);
  } else {
    for (i64 r = 0; r < rows; ++r)
      for (i64 k = 0; k < depth; k += each)
        decode_chunk(shared + *chunks++, kind, out + r * row_stride + k * k_stride, k_stride);
  }
}

// A from registers: register r of lane l holds row l / 4 + 8 (r % 2) of its warp; k runs over (register, lane of four, half).
inline void decode_registers(const Cta& c, const Product& p, i64 group, float (*a)[kMostDepth]) {
  const int halves = p.kind == 2 ? 1 : 2;
  for (int r = 0; r < 4; ++r) {
    const u32* from = c.at<u32>(p.a_registers[r]) + 128 * group;
    for (int t = 0; t < 128; ++t)
      for (int h = 0; h < halves; ++h) {
        const float value = p.kind == 2   ? MmaTf32::half(from[t], h)
                            : p.kind == 1 ? MmaF16::half(from[t], h)
                                          : MmaBf16::half(from[t], h);
        a[16 * (t / kWarp) + t % kWarp / 4 + 8 * (r % 2)][(r / 2) * 4 * halves + (t % 4) * halves + h] = value;
      }
  }
}

template <int Wide>
inline void multiply_block(const float (*a)[kMostDepth], const float* b, i64 columns, i64 depth, float (*out)[Wide]) {
  float s0[Wide] = {}, s1[Wide] = {}, s2[Wide] = {}, s3[Wide] = {};
  for (i64 k = 0; k < depth; ++k) {
    const float* row = b + k * columns;
    const float a0 = a[0][k], a1 = a[1][k], a2 = a[2][k], a3 = a[3][k];
    for (int j = 0; j < Wide; ++j) s0[j] = std::fma(a0, row[j], s0[j]);
    for (int j = 0; j < Wide; ++j) s1[j] = std::fma(a1, row[j], s1[j]);
    for (int j = 0; j < Wide; ++j) s2[j] = std::fma(a2, row[j], s2[j]);
    for (int j = 0; j < Wide; ++j) s3[j] = std::fma(a3, row[j], s3[j]);
  }
  std::memcpy(out[0], s0, sizeof(s0));
  std::memcpy(out[1], s1, sizeof(s1));
  std::memcpy(out[2], s2, sizeof(s2));
  std::memcpy(out[3], s3, sizeof(s3));
}

template <int Wide>
inline void accumulate_block(const Product& p, const float (*a)[kMostDepth], const float* b, const float* old,
                             bool keep, float* out) {
  float sums[4][Wide];
  multiply_block<Wide>(a, b, p.columns, p.depth, sums);
  for (int r = 0; r < 4; ++r) {
    const float* before = old + r * p.columns;
    float* to = out + r * p.columns;
    for (int j = 0; j < Wide; ++j) {
      const float product = p.negative ? -sums[r][j] : sums[r][j];
      to[j] = float_of(canonical(keep ? product + before[j] : product));
    }
  }
}

inline void run_product(const Cta& c, const Product& p, i64 group, const u8* shared) {
  alignas(64) float a[kRows][kMostDepth], b[kMostDepth * kMostColumns];
  const i64 at = c.cta * p.groups + group, size = kRows * p.columns;
  if (p.a_registers)
    decode_registers(c, p, group, a);
  else
    decode_operand(shared, p.a_chunks + p.a_row[at] * p.a_count, kRows, p.depth, p.a_major, p.kind, a[0], kMostDepth,
                   1);
  decode_operand(shared, p.b_chunks + p.b_row[at] * p.b_count, p.columns, p.depth, p.b_major, p.kind, b, 1, p.columns);
  const bool keep = p.keep[at] != 0;
  const float* old = p.old ? p.old + at * size : nullptr;
  float* out = p.out + at * size;
  for (i64 row = 0; row < kRows; row += 4) {
    i64 j = 0;
    for (; j + 32 <= p.columns; j += 32)
      accumulate_block<32>(p, a + row, b + j, old + row * p.columns + j, keep, out + row * p.columns + j);
    for (; j < p.columns; j += 8)
      accumulate_block<8>(p, a + row, b + j, old + row * p.columns + j, keep, out + row * p.columns + j);
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
      i32x16 over = {};
      for (i64 g = first; o.many % 4 == 0 && g < first + o.many; g += 4) over |= load_vector<i32x16>(tags + g) > limit;
      const bool quiet = o.many % 4 == 0 && !any(over);
      for (i64 g = first; !quiet && g < first + o.many; ++g) look(g, fenced);
      for (i64 g = first; g < first + o.many; ++g) {
        operand[g] = now;
        ++operands[g];
      }
    }
  }

  // The warpgroup knows that they have been read.
  void were_read(i32 step) {
    for (i64 k = 0; k < o.count; ++k)
      for (i64 g = o.first[k]; g < o.first[k] + o.many; ++g) {
        --operands[g];
        // Each warp in turn: the first is the reader if there is none, the last other than the reader is the second.
        const i32 now = i32(u32(step) << kWarpBits);
        if (tags[g].reader <= floor) tags[g].reader = now | leader;
        const bool last = (tags[g].reader & kWarpMask) == leader + 3;
        tags[g].reader_too = now | (leader + (last ? 2 : 3));
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
