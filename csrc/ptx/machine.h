// The vector machine of the PTX emulator: what the Python side hands over, and how an instruction sees it.
//
// An instruction runs over all threads of one CTA before the next one does, as in the interpreter, which is the
// definition: so the order of accesses, and with it every finding of the checks, is the interpreter's. CTAs run one
// after the other, so that the registers of one stay in cache from instruction to instruction.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace ptx::PTX_LEVEL {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i8 = std::int8_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

constexpr int kMostThreads = 1024;
constexpr int kWarp = 32;
constexpr i32 kNone = INT32_MIN;  // no operand
constexpr i64 kHeapBase = 0x100000000;
constexpr i64 kSharedBase = 1024;  // addresses below are unmapped
constexpr int kWarpBits = 6;       // of a tag, as in Checker
constexpr i32 kWarpMask = 63;
constexpr i64 kRounding = 64;  // units in the last place, as ROUNDING in core/shared.py

// One instruction. Its layout is known to native/encode.py.
struct Op {
  i32 code;     // number of its handler
  i32 number;   // of the instruction in the kernel
  i32 guard;    // operand of its predicate, kNone where it has none
  i32 negated;  // whether the guard is
  i32 step;     // the how-manyth access to shared memory of the run it is, from 1; 0: it is none
  i32 a[11];    // operands and what else the handler knows
};

enum Kind {
  kWriteRead,
  kWriteWrite,
  kReadWrite,
  kReadFlight,
  kWriteFlight,
  kWriteOperand,
  kReadByProduct,
  kProductReadsFlight,
  kProductUnfenced,
  kPendingUsed,
  kPendingOverwritten,
  kWrittenAfterFence,
  kSameWritten,
  kNearWritten,
  kUnwrittenRead,
};

struct Finding {
  i32 kind, here, other;  // numbers of instructions
  i32 granule, other_warp, warp, cta, epoch;
};

enum End { kNext, kJump, kLeave, kBarrier };

// A straight run of operations and what ends it. Its layout is known to native/program.py.
struct Block {
  i32 first, count;     // operations; -1 for a block that the interpreter must run
  i32 size;             // instructions
  i32 end, target;      // End, and the block that it jumps to
  i32 guard, negated;   // of the end; kNone where it has none
  i32 steps;            // accesses to shared memory in it
  i32 numbers;          // the list of their instructions
  i32 together;         // whether only all threads together may run it
};

constexpr i32 kDone = INT32_MAX;  // the block of a thread that has left

enum Outcome { kFinished, kAtBlock, kApart, kFailed };

enum Counter {
  kLoadSectors,
  kLoadBytes,
  kLoadRequests,
  kStoreSectors,
  kStoreBytes,
  kStoreRequests,
  kSharedLoadWavefronts,
  kSharedLoadIdeal,
  kSharedLoadBytes,
  kSharedLoadRequests,
  kSharedStoreWavefronts,
  kSharedStoreIdeal,
  kSharedStoreBytes,
  kSharedStoreRequests,
  kAsyncBytes,
  kBarriers,
  kWarpInstructions,
  kTensor,  // the first of the tensor-core kinds that the program has
};

// The tags of one granule of shared memory, step << kWarpBits | warp, as in Checker.
struct Tags {
  i32 writer, reader, reader_too, flight;
};

struct Copies;
struct Products;

// One batch of CTAs. Its layout is known to native/library.py.
struct Batch {
  i64 ctas, threads;
  char* registers;  // of a CTA after the other
  i64 register_bytes;
  char* constants;
  u8* heap;
  i64 buffers;
  const i64 *starts, *stops;
  u8* shared;
  i64 shared_stride, shared_end;
  const u8* parameters;
  i64 parameter_bytes;
  const u8* bank;
  i64 bank_bytes;
  i64 checks, granule, granules;
  Tags* tags;            // [CTAs][granules]
  i32* seen;             // [CTAs][warps][warps]
  i64 floor;
  i32* trace;            // step -> instruction
  i64 most_steps;        // that the trace has room for
  i64* epochs;           // of each CTA: barriers passed
  const i16* operands;   // [CTAs][granules]: pending products that read them; null where none is pending
  i32* operand;          // the tag of the last of these
  i16* all_operands;     // `operands`, pending or not
  i32* fence;            // [CTAs][warps]: the step of the last fence.proxy.async
  Finding* findings;
  i64 most_findings, found;
  i64* counters;
  const i32* extra;      // lists of operands
  Copies* copies;        // in flight
  Products* products;    // of the CTA that runs alone
  i64 cta_failed, op_failed;
  i64 block, step;  // where a CTA that was not finished is
  i32* at;          // [threads]: the block of each thread, where they are apart
};

// One CTA at one instruction.
struct Cta {
  Batch& b;
  i64 cta;
  char* registers;
  int n;      // threads
  i64 step;   // of the run's first access to shared memory, less one
  i32 floor;  // every tag up to it is known to all warps
  template <class T>
  T* at(i32 operand) const {
    return reinterpret_cast<T*>(operand >= 0 ? registers + operand : b.constants + ~operand);
  }
  u8* shared() const { return b.shared + cta * b.shared_stride; }
  Tags* tags() const { return b.tags + cta * b.granules; }
  const i32* list(i32 first) const { return b.extra + first; }
};

// Runs the instruction on the threads of the mask, null for all. False: it cannot; the interpreter knows what to say.
using Handler = bool (*)(Cta&, const Op&, const u8* mask);

struct Entry {
  const char* name;
  Handler run;
};

inline bool active(const u8* mask, int thread) { return mask == nullptr || mask[thread] != 0; }

// A bit for each lane of a warp that the mask has.
inline u32 lanes_of(const u8* mask, int warp) {
  if (mask == nullptr) return 0xFFFFFFFFu;
  u32 bits = 0;
  for (int l = 0; l < kWarp; ++l) bits |= u32(mask[warp * kWarp + l] != 0) << l;
  return bits;
}

}  // namespace ptx::PTX_LEVEL
