// wgmma of a CTA that runs alone: products in flight, their accumulators, and what the checks ask of its registers.
#pragma once

#include "products.h"

namespace ptx::PTX_LEVEL {

constexpr int kMostGroups = kMostThreads / 128, kMostFlying = 64, kMostChunks = 2 * kMostColumns;
constexpr int kMostShapes = 8;

// A `wgmma.mma_async`, a list of numbers: native/wgmma.py writes it.
struct MmaAsync {
  i32 key;  // which accumulators
  i32 columns, depth, kind, negative, a_major, b_major;
  i32 a, b;            // operands that hold descriptors; a: kNone where A comes from registers
  i32 a_registers;     // their list
  i32 scale, negated;  // the predicate whether to accumulate; kNone: always
  i32 registers;       // list of the accumulators' operands
  i32 watched, inputs, input_count;  // lists of watched registers: the accumulators, and A's
  i32 counter;
};

struct Flying {
  const MmaAsync* mma;
  i64 group;
  i32 number;
  i32 a_count, b_count;
  i32 a_first[kMostGroups][kMostChunks], b_first[kMostGroups][kMostChunks];  // granules
};

struct Accumulators {
  float* matrix;  // [groups][columns][64]
  i32* tokens;    // of their registers, when they were last delivered
  bool held, settled;
};

// The chunks of operands whose descriptors differ in the start alone.
struct Chunks {
  u64 descriptor;  // without its start
  i32 rows, depth, major;
  i32 count;  // 0: not known yet
  i32 offset[kMostChunks];
};

// A watched register has a token: a new one whenever it is written, that of its source when it is renamed. So a token is older
// than the last fence just where the value was in a register then.
struct Products {
  Products(i64 watched, i64 keys, const i32* columns, i64 threads)
      : count(watched),
        key_count(keys),
        token(new i32[size_t(watched) + 1]),
        pending(new u8[size_t(watched) + 1]),
        input(new u8[size_t(watched) + 1]),
        keys(new Accumulators[size_t(keys)]),
        flying(new Flying[kMostFlying]) {
    for (i64 k = 0; k < keys; ++k) {
      this->keys[k].matrix = new float[size_t(threads / 128 * kRows * columns[k])];
      this->keys[k].tokens = new i32[size_t(columns[k] / 2)];
    }
  }
  Products(const Products&) = delete;
  ~Products() {
    for (i64 k = 0; k < key_count; ++k) {
      delete[] keys[k].matrix;
      delete[] keys[k].tokens;
    }
    delete[] token;
    delete[] pending;
    delete[] input;
    delete[] keys;
    delete[] flying;
  }

  i64 count, key_count;
  i32* token;
  u8 *pending, *input;  // whether a product in flight writes, or reads, the register
  Accumulators* keys;
  Flying* flying;
  int aloft = 0;
  i32 next = 0, mark = -1;
  i64 group = 0;
  Chunks chunks[kMostShapes] = {};
  int newest = 0;

  // Those of a shape: kept, or to be filled in in place of the oldest.
  Chunks& chunks_of(u64 descriptor, i32 rows, i32 depth, i32 major) {
    for (Chunks& one : chunks)
      if (one.count && one.descriptor == descriptor && one.rows == rows && one.depth == depth && one.major == major)
        return one;
    newest = (newest + 1) % kMostShapes;
    Chunks& one = chunks[newest];
    one.descriptor = descriptor, one.rows = rows, one.depth = depth, one.major = major, one.count = 0;
    return one;
  }
  void reset() {
    for (i64 i = 0; i < count; ++i) token[i] = i32(i);
    std::memset(pending, 0, size_t(count));
    std::memset(input, 0, size_t(count));
    for (i64 k = 0; k < key_count; ++k) keys[k].held = keys[k].settled = false;
    aloft = 0;
    next = i32(count);
    mark = -1;
    group = 0;
  }
  bool idle() const {
    for (i64 k = 0; k < key_count; ++k)
      if (keys[k].held) return false;
    return aloft == 0;
  }
  void note_pending(const i32* extra, const MmaAsync& mma) {
    for (i32 i = 0; i < mma.columns / 2; ++i) pending[extra[mma.watched + i]] = 1;
    for (i32 i = 0; i < mma.input_count; ++i) input[extra[mma.inputs + i]] = 1;
  }
  void note_all_pending(const i32* extra) {
    std::memset(pending, 0, size_t(count));
    std::memset(input, 0, size_t(count));
    for (int f = 0; f < aloft; ++f) note_pending(extra, *flying[f].mma);
  }
};

inline void note(Cta& c, Kind kind, i32 here, i32 other) {
  Batch& b = c.b;
  if (!b.checks) return;
  for (i64 i = 0; i < b.found; ++i)
    if (b.findings[i].kind == kind && b.findings[i].here == here && b.findings[i].other == other) return;
  if (b.found < b.most_findings)
    b.findings[b.found++] = {i32(kind), here, other, -1, -1, -1, i32(c.cta), i32(b.epochs[c.cta])};
}

// a: 0 and 1 a list of watched registers that are written.
inline bool touch(Cta& c, const Op& op, const u8*) {
  Products& p = *c.b.products;
  for (i32 i = 0; i < op.a[1]; ++i) p.token[c.list(op.a[0])[i]] = p.next++;
  return true;
}
// a: 0 the watched register written, 1 the one moved there, -1 for an immediate.
inline bool rename(Cta& c, const Op& op, const u8* mask) {
  Products& p = *c.b.products;
  p.token[op.a[0]] = mask ? p.next++ : op.a[1] < 0 ? -1 : p.token[op.a[1]];
  return true;
}
// a: 0 and 1 the list of watched registers that an instruction names, 2 and 3 of those that it writes.
inline bool uses(Cta& c, const Op& op, const u8*) {
  Products& p = *c.b.products;
  if (p.aloft == 0) return true;
  const auto meets = [&](const u8* flags, i32 list, i32 count) {
    for (i32 i = 0; i < count; ++i)
      if (flags[c.list(list)[i]]) return true;
    return false;
  };
  const auto tell = [&](Kind kind, i32 list, i32 count, bool inputs) {
    for (int f = 0; f < p.aloft; ++f) {
      const MmaAsync& mma = *p.flying[f].mma;
      const i32* theirs = c.list(inputs ? mma.inputs : mma.watched);
      const i32 many = inputs ? mma.input_count : mma.columns / 2;
      for (i32 i = 0; i < count; ++i)
        for (i32 k = 0; k < many; ++k)
          if (c.list(list)[i] == theirs[k]) return note(c, kind, op.number, p.flying[f].number);
    }
  };
  if (meets(p.pending, op.a[0], op.a[1])) tell(kPendingUsed, op.a[0], op.a[1], false);
  if (meets(p.input, op.a[2], op.a[3])) tell(kPendingOverwritten, op.a[2], op.a[3], true);
  return true;
}

inline bool product_fence(Cta& c, const Op&, const u8* mask) {
  c.b.products->mark = c.b.products->next;
  return mask == nullptr && c.n % 128 == 0;
}
inline bool product_commit(Cta& c, const Op&, const u8* mask) {
  ++c.b.products->group;
  return mask == nullptr && c.n % 128 == 0;
}

// The offset of each chunk of an operand from the operand's start, before the swizzle. `chunk_addresses` in descriptors.py
// computes the same.
inline void chunk_offsets(u64 descriptor, i64 width, i64 size, Chunks& out) {
  const i64 leading = i64(descriptor >> 16 & 0x3FFF) << 4, stride = i64(descriptor >> 32 & 0x3FFF) << 4;
  const i64 each = kChunk / size;
  const auto put = [&](i64 offset) { out.offset[out.count++] = i32(offset); };
  out.count = 0;
  if (out.major) {
    const i64 tile = width ? width / size : 1;
    for (i64 k = 0; k < out.depth; ++k)
      for (i64 r = 0; r < out.rows; r += each)
        put(width ? r / tile * leading + k / 8 * stride + k % 8 * width + size * (r % tile)
                  : r / each * stride + k / 8 * leading + k % 8 * kChunk);
  } else {
    for (i64 r = 0; r < out.rows; ++r)
      for (i64 k = 0; k < out.depth; k += each)
        put(r / 8 * stride + (width ? size * k : k / each * leading) + r % 8 * (width ? width : kChunk));
  }
}

// The addresses of an operand's chunks; false where they are none.
inline bool chunk_addresses(const Cta& c, u64 descriptor, i32 rows, i32 depth, i64 size, i32 major, i32* out,
                            i32* count) {
  if (descriptor >> 49 & 7) return false;
  const i64 mode = i64(descriptor >> 62), width = mode == 0 ? 0 : mode == 1 ? 128 : mode == 2 ? 64 : 32;
  Chunks& chunks = c.b.products->chunks_of(descriptor & ~u64(0x3FFF), rows, depth, major);
  if (chunks.count == 0) chunk_offsets(descriptor, width, size, chunks);
  const i32 start = i32(descriptor & 0x3FFF) << 4, swizzle = width ? i32(width / kChunk - 1) : 0;
  i32 low = INT32_MAX, high = 0;
  for (i32 i = 0; i < chunks.count; ++i) {
    i32 address = chunks.offset[i] + start;
    address ^= ((address >> 7) & swizzle) << 4;
    low = address < low ? address : low;
    high = address > high ? address : high;
    out[i] = address;
  }
  *count = chunks.count;
  return low >= kSharedBase && high + kChunk <= c.b.shared_end;
}

template <class T>
bool alike(const T* values, i64 group) {
  bool same = true;
  for (int t = 0; t < 128; ++t) same &= values[128 * group + t] == values[128 * group];
  return same;
}

// Lane 4g + q of a warp holds, in the i-th register, row g + 8 (i / 2 % 2) and column 8 (i / 4) + 2q + i % 2.
inline i64 accumulator(i32 i, int warp, int q) {
  return (8 * (i / 4) + 2 * q + i % 2) * kRows + 16 * warp + 8 * (i / 2 % 2);
}
inline void load_accumulators(const Cta& c, const MmaAsync& f, i64 group, float* matrix) {
  for (i32 i = 0; i < f.columns / 2; ++i)
    for (int w = 0; w < 4; ++w) {
      const float* from = c.at<float>(c.list(f.registers)[i]) + 128 * group + kWarp * w;
      for (int q = 0; q < 4; ++q)
        for (int g = 0; g < 8; ++g) matrix[accumulator(i, w, q) + g] = from[4 * g + q];
    }
}
inline void store_accumulators(const Cta& c, const MmaAsync& f, i64 group, const float* matrix) {
  for (i32 i = 0; i < f.columns / 2; ++i)
    for (int w = 0; w < 4; ++w) {
      float* to = c.at<float>(c.list(f.registers)[i]) + 128 * group + kWarp * w;
      float column[4][8];
      for (int q = 0; q < 4; ++q) std::memcpy(column[q], matrix + accumulator(i, w, q), sizeof(column[q]));
      const v16 a = load_vector<v16>(column[0]), b = load_vector<v16>(column[2]);
      store_vector(to, __builtin_shufflevector(a, b, 0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27));
      store_vector(to + 16, __builtin_shufflevector(a, b, 4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31));
    }
}

inline bool product(Cta& c, const Op& op, const u8* mask) {
  Products& p = *c.b.products;
  if (mask != nullptr || c.n % 128 || p.aloft == kMostFlying) return false;
  const MmaAsync& f = *reinterpret_cast<const MmaAsync*>(c.list(op.a[0]));
  const i64 groups = c.n / 128, size = f.kind == 2 ? 4 : 2;
  Flying& one = p.flying[p.aloft];
  u8 keep[kMostGroups], everyone[kMostGroups];
  i32 rows[kMostGroups];
  for (i64 g = 0; g < groups; ++g) {
    const u64* b = c.at<u64>(f.b);
    if (!alike(b, g) ||
        !chunk_addresses(c, b[128 * g], f.columns, f.depth, size, f.b_major, one.b_first[g], &one.b_count))
      return false;
    one.a_count = 0;
    if (f.a != kNone) {
      const u64* a = c.at<u64>(f.a);
      if (!alike(a, g) ||
          !chunk_addresses(c, a[128 * g], kRows, f.depth, size, f.a_major, one.a_first[g], &one.a_count))
        return false;
    }
    keep[g] = everyone[g] = 1;
    rows[g] = i32(g);
    if (f.scale == kNone) continue;
    const u8* scale = c.at<u8>(f.scale);
    if (!alike(scale, g)) return false;
    keep[g] = scale[128 * g] != u8(f.negated);
  }
  Accumulators& sum = p.keys[f.key];
  const i64 matrix = kRows * f.columns;
  const i32* watched = c.list(f.watched);
  bool written = p.mark < 0, known = sum.held, current = sum.settled;
  for (i32 i = 0; i < f.input_count; ++i) written |= p.token[c.list(f.inputs)[i]] >= p.mark;
  for (i32 i = 0; i < f.columns / 2; ++i) {
    written |= !sum.held && p.token[watched[i]] >= p.mark;
    current &= p.token[watched[i]] == sum.tokens[i];
  }
  if (written) note(c, kWrittenAfterFence, op.number, op.number);
  known |= current;
  for (i64 g = 0; !known && g < groups; ++g)
    if (keep[g]) load_accumulators(c, f, g, sum.matrix + g * matrix);
  Product call{};
  call.groups = groups, call.columns = f.columns, call.depth = f.depth, call.kind = f.kind, call.negative = f.negative;
  call.a_chunks = one.a_first[0], call.a_row = rows, call.a_count = kMostChunks, call.a_major = f.a_major;
  call.a_registers = f.a == kNone ? c.list(f.a_registers) : nullptr;
  call.b_chunks = one.b_first[0], call.b_row = rows, call.b_count = kMostChunks, call.b_major = f.b_major;
  call.active = everyone, call.keep = keep, call.old = call.out = sum.matrix;
  const Cta first{c.b, 0, c.registers, c.n, c.step, c.floor};
  for (i64 g = 0; g < groups; ++g) run_product<true>(first, call, g, c.shared());
  for (i64 g = 0; g < groups; ++g) {
    const int shift = c.b.granule == 4 ? 2 : c.b.granule == 2 ? 1 : 0;
    for (i32 k = 0; k < one.a_count; ++k) one.a_first[g][k] >>= shift;
    for (i32 k = 0; k < one.b_count; ++k) one.b_first[g][k] >>= shift;
    if (!c.b.checks) continue;
    for (int which = 0; which < 2; ++which) {
      const Operand operand{which ? one.b_count : one.a_count,
                            kChunk / c.b.granule,
                            which ? one.b_first[g] : one.a_first[g],
                            c.b.operand,
                            c.b.all_operands,
                            c.b.fence};
      Operands(c, op, operand, g).read(i32(c.step + op.step));
    }
  }
  sum.held = true;
  sum.settled = false;
  one.mma = &f, one.group = p.group, one.number = op.number;
  ++p.aloft;
  p.note_pending(c.b.extra, f);
  c.b.operands = c.b.all_operands;
  c.b.counters[f.counter] += 2 * kRows * f.columns * f.depth * groups;
  return true;
}

// a[0]: how many of the newest groups may stay in flight.
inline bool product_wait(Cta& c, const Op& op, const u8* mask) {
  Products& p = *c.b.products;
  if (mask != nullptr || c.n % 128) return false;
  const i64 groups = c.n / 128;
  const MmaAsync* done[kMostFlying];  // of products that are over
  int over = 0, left = 0;
  for (int f = 0; f < p.aloft; ++f) {
    Flying& one = p.flying[f];
    if (one.group >= p.group - op.a[0]) {
      if (left != f) p.flying[left] = one;
      ++left;
      continue;
    }
    done[over++] = one.mma;
    for (i64 g = 0; c.b.checks && g < groups; ++g)
      for (int which = 0; which < 2; ++which) {
        const Operand operand{which ? one.b_count : one.a_count,
                              kChunk / c.b.granule,
                              which ? one.b_first[g] : one.a_first[g],
                              c.b.operand,
                              c.b.all_operands,
                              c.b.fence};
        Operands(c, op, operand, g).were_read(i32(c.step + op.step));
      }
  }
  p.aloft = left;
  for (int k = 0; k < over; ++k) {
    const MmaAsync& f = *done[k];
    Accumulators& sum = p.keys[f.key];
    bool busy = !sum.held;
    for (int o = 0; o < p.aloft; ++o) busy |= p.flying[o].mma->key == f.key;
    if (busy) continue;
    for (i64 g = 0; g < groups; ++g) store_accumulators(c, f, g, sum.matrix + g * kRows * f.columns);
    for (i32 i = 0; i < f.columns / 2; ++i) sum.tokens[i] = p.token[c.list(f.watched)[i]] = p.next++;
    sum.held = false;
    sum.settled = true;
  }
  if (over) p.note_all_pending(c.b.extra);
  if (p.aloft == 0) c.b.operands = nullptr;
  return true;
}

inline bool proxy_fence(Cta& c, const Op& op, const u8* mask) {
  const int warps = c.n / kWarp;
  for (int w = 0; c.b.checks && w < warps; ++w)
    if (lanes_of(mask, w)) c.b.fence[c.cta * warps + w] = i32(c.step + op.step);
  return true;
}

}  // namespace ptx::PTX_LEVEL
