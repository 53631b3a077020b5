// What the checks remember of shared memory, access by access: Checker of the interpreter, for one CTA's row.
#pragma once

#include "vector.h"

namespace ptx::PTX_LEVEL {

// The threads of an access and their addresses in the CTA's shared memory, in the order of the threads.
struct Access {
  int count;
  i64 size;  // bytes a thread
  u16 thread[kMostThreads];
  i32 address[kMostThreads];
};

inline void report(Cta& c, const Op& op, Kind kind, i32 tag, i64 granule, int warp) {
  Batch& b = c.b;
  const i32 other = b.trace[tag >> kWarpBits];
  for (i64 i = 0; i < b.found; ++i) {
    const Finding& f = b.findings[i];
    if (f.kind == kind && f.here == op.number && f.other == other) return;
  }
  if (b.found < b.most_findings)
    b.findings[b.found++] = {i32(kind),       op.number, other,      i32(granule),
                             tag & kWarpMask, warp,      i32(c.cta), i32(b.epochs[c.cta])};
}

class Checks {
 public:
  Checks(Cta& cta, const Op& instruction)
      : c(cta), op(instruction), tags(cta.tags()), floor(cta.floor), step(i32(cta.step + instruction.step)) {
    warps = cta.n / kWarp;
    seen = cta.b.seen + cta.cta * warps * warps;
    shift = cta.b.granule == 4 ? 2 : cta.b.granule == 2 ? 1 : 0;
    operands = cta.b.operands ? cta.b.operands + cta.cta * cta.b.granules : nullptr;
    operand = cta.b.operand + cta.cta * cta.b.granules;
  }

  // A read of `size` bytes by each thread.
  void read(const Access& access) {
    const int many = granules(access.size);
    if (many % 4 == 0) return read_rows(access, many);
    for (int i = 0; i < access.count; ++i) look(access, i, many);
    note_readers(access, many);
  }

  // A write, about to happen; `differs` says how far the i-th thread's value is from what memory holds: 0, 1 or 2, as
  // `apart`.
  template <class F>
  void write(const Access& access, F differs) {
    const int many = granules(access.size);
    for (int i = 0; i < access.count; ++i) {
      const int warp = access.thread[i] >> 5;
      const i64 first = access.address[i] >> shift;
      if (quiet(first, many)) continue;
      for (int k = 0; k < many; ++k) against(first + k, warp, i, differs);
    }
    for (int i = 0; i < access.count; ++i) {
      const i64 first = access.address[i] >> shift;
      const i32 now = tag(access.thread[i] >> 5);
      for (int k = 0; k < many; ++k) {
        i32& writer = tags[first + k].writer;
        twice |= (writer >> kWarpBits) == step && writer != now;
        writer = now;
      }
    }
  }

  // After the write: two warps that wrote one granule in the same instruction.
  template <class F>
  void wrote(const Access& access, F differs) {
    if (!twice) return;
    const int many = granules(access.size);
    for (int i = 0; i < access.count; ++i) {
      const int warp = access.thread[i] >> 5;
      const i64 first = access.address[i] >> shift;
      for (int k = 0; k < many; ++k) {
        const i32 writer = tags[first + k].writer;
        if ((writer & kWarpMask) != warp) report(c, op, written_twice(differs(i)), writer, first + k, warp);
      }
    }
  }

  // cp.async: from now until it is waited for it may land at any time.
  void issued(const Access& access) {
    const int many = granules(access.size);
    for (int i = 0; i < access.count; ++i) {
      const i64 first = access.address[i] >> shift;
      if (quiet(first, many)) continue;
      for (int k = 0; k < many; ++k) against(first + k, access.thread[i] >> 5, i, [](int) { return 2; });
    }
    for (int i = 0; i < access.count; ++i) {
      const i64 first = access.address[i] >> shift;
      for (int k = 0; k < many; ++k) tags[first + k].flight = tag(access.thread[i] >> 5);
    }
  }

  void landed(i32 address, i64 size, int warp) {
    const i64 first = address >> shift;
    const int many = granules(size);
    for (int k = 0; k < many; ++k) {
      tags[first + k].writer = tag(warp);
      tags[first + k].flight = 0;
    }
  }

 private:
  // A fault where the values differ; where they agree, or but for rounding, a note.
  static Kind written_twice(int apart) { return apart == 0 ? kSameWritten : apart == 1 ? kNearWritten : kWriteWrite; }

  void look(const Access& access, int i, int many) {
    const int warp = access.thread[i] >> 5;
    const i64 first = access.address[i] >> shift;
    for (int k = 0; k < many; ++k) {
      const Tags& t = tags[first + k];
      if (unseen(t.writer, warp)) report(c, op, kWriteRead, t.writer, first + k, warp);
      if (t.writer == 0 && t.flight == 0) report(c, op, kUnwrittenRead, tag(warp), first + k, warp);
      if (t.flight > 0) report(c, op, kReadFlight, t.flight, first + k, warp);
    }
  }

  // Whether nothing that a write could race with has touched the granules since all warps last met.
  bool quiet(i64 first, int many) const {
    for (int k = 0; operands && k < many; ++k)
      if (operands[first + k]) return false;
    if (many % 4 == 0) {
      i32x16 over = load_vector<i32x16>(tags + first) > limits(floor, floor, floor, 0);
      for (int k = 4; k < many; k += 4) over |= load_vector<i32x16>(tags + first + k) > limits(floor, floor, floor, 0);
      return !any(over);
    }
    bool still = true;
    for (int k = 0; k < many; ++k) {
      const Tags& t = tags[first + k];
      still &= (t.writer <= floor) & (t.reader <= floor) & (t.reader_too <= floor) & (t.flight <= 0);
    }
    return still;
  }

  static i32x16 limits(i32 a, i32 b, i32 d, i32 e) { return i32x16{a, b, d, e, a, b, d, e, a, b, d, e, a, b, d, e}; }

  // `read` where an access has fours of granules: all tags of four at once.
  void read_rows(const Access& access, int many) {
    const i32x16 limit = limits(floor, INT32_MAX, INT32_MAX, 0);
    const i32x16 writer = limits(-1, 0, 0, 0), reader = limits(0, -1, 0, 0), reader_too = limits(0, 0, -1, 0);
    for (int i = 0; i < access.count; ++i) {
      Tags* row = tags + (access.address[i] >> shift);
      const i32 now = tag(access.thread[i] >> 5);
      i32x16 over = {};
      for (int k = 0; k < many; k += 4) {
        const i32x16 t = load_vector<i32x16>(row + k);
        over |= (t > limit) | ((t == 0) & writer);
        const i32x16 fresh = ((t <= floor) | ((t >> kWarpBits) == step)) & reader;
        store_vector(row + k, (fresh & now) | (~fresh & t));
      }
      if (any(over)) look(access, i, many);
    }
    for (int i = 0; i < access.count; ++i) {
      Tags* row = tags + (access.address[i] >> shift);
      const i32 now = tag(access.thread[i] >> 5);
      for (int k = 0; k < many; k += 4) {
        const i32x16 t = load_vector<i32x16>(row + k);
        const i32x16 readers = __builtin_shufflevector(t, t, 1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9, 13, 13, 13, 13);
        const i32x16 other = (((readers ^ now) & kWarpMask) != 0) & reader_too;
        if (any(other)) store_vector(row + k, (other & now) | (~other & t));
      }
    }
  }

  int granules(i64 size) const { return size >> shift > 1 ? int(size >> shift) : 1; }
  i32 tag(int warp) const { return i32(u32(step) << kWarpBits) | warp; }

  // Whether an access with the tag is another warp's and not ordered before what `warp` does now.
  bool unseen(i32 other, int warp) const {
    if (other <= floor || (other & kWarpMask) == warp) return false;
    const int by = (other & kWarpMask) < warps ? (other & kWarpMask) : int(warps) - 1;
    return (other >> kWarpBits) > seen[warp * warps + by];
  }

  template <class F>
  void against(i64 granule, int warp, int i, F differs) {
    const Tags& t = tags[granule];
    if (unseen(t.writer, warp)) report(c, op, written_twice(differs(i)), t.writer, granule, warp);
    if (unseen(t.reader, warp)) report(c, op, kReadWrite, t.reader, granule, warp);
    if (unseen(t.reader_too, warp)) report(c, op, kReadWrite, t.reader_too, granule, warp);
    if (t.flight > 0) report(c, op, kWriteFlight, t.flight, granule, warp);
    if (operands && operands[granule] > 0) report(c, op, kWriteOperand, operand[granule], granule, warp);
  }

  // Of several that read a granule first in one instruction the last is remembered, and one of the others.
  void note_readers(const Access& access, int many) {
    for (int i = 0; i < access.count; ++i) {
      const i64 first = access.address[i] >> shift;
      const i32 now = tag(access.thread[i] >> 5);
      for (int k = 0; k < many; ++k) {
        i32& reader = tags[first + k].reader;
        if (reader <= floor || (reader >> kWarpBits) == step) reader = now;
      }
    }
    for (int i = 0; i < access.count; ++i) {
      const i64 first = access.address[i] >> shift;
      const i32 now = tag(access.thread[i] >> 5);
      for (int k = 0; k < many; ++k)
        if (((tags[first + k].reader ^ now) & kWarpMask) != 0) tags[first + k].reader_too = now;
    }
  }

  Cta& c;
  const Op& op;
  Tags* tags;
  i32 floor, step;
  i64 warps;
  const i32* seen;
  const i16* operands;
  const i32* operand;
  int shift;
  bool twice = false;  // two warps have written a granule in this instruction
};

}  // namespace ptx::PTX_LEVEL
