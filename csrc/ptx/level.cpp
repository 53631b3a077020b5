// The vector machine for one instruction-set level: loops over CTAs, blocks and instructions.
#include "levels.h"
#include "table.h"

namespace ptx::PTX_LEVEL {
namespace {

struct Lanes {
  bool any, all;
};

Lanes survey(const u8* mask, int n) {
  u64 some = 0, every = 0x0101010101010101u;
  for (int i = 0; i < n; i += 8) {
    u64 eight;
    std::memcpy(&eight, mask + i, 8);
    some |= eight;
    every &= eight;
  }
  return {some != 0, every == 0x0101010101010101u};
}

bool run_cta(Cta& c, const Op* ops, i64 count, const u8* live) {
  alignas(64) u8 held[kMostThreads];
  for (i64 k = 0; k < count; ++k) {
    const Op& op = ops[k];
    const u8* mask = live;
    if (op.guard != kNone) {
      const u8* guard = c.at<u8>(op.guard);
      const u8 turned = u8(op.negated);
      if (live == nullptr) {
        for (int t = 0; t < c.n; ++t) held[t] = guard[t] ^ turned;
      } else {
        for (int t = 0; t < c.n; ++t) held[t] = (guard[t] ^ turned) & live[t];
      }
      const Lanes lanes = survey(held, c.n);
      if (!lanes.any) continue;
      mask = lanes.all ? nullptr : held;
    }
    if (!kTable[op.code].run(c, op, mask)) {
      c.b.cta_failed = c.cta;
      c.b.op_failed = k;
      return false;
    }
  }
  return true;
}

// All warps of the CTA have met: each knows what every other one has done.
void meet(Cta& c, i64 step) {
  Batch& b = c.b;
  b.counters[kBarriers] += 1;
  if (!b.checks) return;
  const i64 warps = c.n / kWarp;
  b.epochs[c.cta] += 1;
  for (i64 i = 0; i < warps * warps; ++i) b.seen[c.cta * warps * warps + i] = i32(step);
  c.floor = i32(step << kWarpBits) | kWarpMask;
}

// Run the operations of a block; false: one cannot be done.
bool run_block(Cta& c, const Block& block, i64 number, const Op* ops, const u8* mask) {
  Batch& b = c.b;
  i64 warps = 0;
  for (int w = 0; w < c.n; w += kWarp) warps += mask == nullptr || survey(mask + w, kWarp).any;
  b.counters[kWarpInstructions] += i64(block.size) * warps;
  std::memcpy(b.trace + c.step + 1, c.list(block.numbers), sizeof(i32) * size_t(block.steps));
  if (!run_cta(c, ops + block.first, block.count, mask)) {
    b.op_failed += block.first;
    b.step = c.step;
    b.block = number;
    for (int t = 0; t < c.n && mask == nullptr; ++t) b.at[t] = i32(number);
    return false;
  }
  c.step += block.steps;
  return true;
}

// Threads that are at different blocks, `at` of the batch, the lowest block first, until they meet: kAtBlock.
Outcome walk_apart(Cta& c, const Block* blocks, i64 count, const Op* ops, i64* number) {
  Batch& b = c.b;
  i32* at = b.at;
  alignas(64) u8 mask[kMostThreads];
  while (true) {
    i32 low = at[0], high = at[0];
    for (int t = 1; t < c.n; ++t) {
      low = at[t] < low ? at[t] : low;
      high = at[t] > high ? at[t] : high;
    }
    *number = low;
    if (low == high) return kAtBlock;
    if (high == kDone || low >= count) return kApart;
    const Block& block = blocks[low];
    if (block.first < 0 || block.together || c.step + block.steps + 1 >= b.most_steps) return kApart;
    for (int t = 0; t < c.n; ++t) mask[t] = at[t] == low;
    if (!run_block(c, block, low, ops, mask)) return kFailed;
    const u8* guard = block.guard == kNone ? nullptr : c.at<u8>(block.guard);
    const i32 target = block.end == kJump ? block.target : block.end == kLeave ? kDone : low + 1;
    for (int t = 0; t < c.n; ++t)
      if (mask[t]) at[t] = guard == nullptr || guard[t] != u8(block.negated) ? target : low + 1;
  }
}

// From its first block to its end, as long as every block has operations, and no thread meets a barrier without the others.
Outcome walk(Cta& c, const Block* blocks, i64 count, const Op* ops) {
  Batch& b = c.b;
  i64 number = 0;
  while (number < count) {
    const Block& block = blocks[number];
    b.block = number;
    b.step = c.step;
    if (block.first < 0 || c.step + block.steps + 1 >= b.most_steps) return kAtBlock;
    if (!run_block(c, block, number, ops, nullptr)) return kFailed;
    bool goes = true;
    if (block.guard != kNone) {
      const u8* guard = c.at<u8>(block.guard);
      const Lanes lanes = survey(guard, c.n);
      if (lanes.any != lanes.all) {
        const i32 target = block.end == kJump ? block.target : block.end == kLeave ? kDone : i32(number + 1);
        for (int t = 0; t < c.n; ++t) b.at[t] = guard[t] != u8(block.negated) ? target : i32(number + 1);
        const Outcome outcome = walk_apart(c, blocks, count, ops, &number);
        b.step = c.step;
        if (outcome != kAtBlock) return outcome;
        continue;
      }
      goes = lanes.any != (block.negated != 0);
    }
    if (goes && block.end == kLeave) return kFinished;
    if (goes && block.end == kBarrier) {
      b.trace[++c.step] = -1;
      meet(c, c.step);
    }
    number = goes && block.end == kJump ? block.target : number + 1;
  }
  return kFinished;
}

}  // namespace
}  // namespace ptx::PTX_LEVEL

using namespace ptx::PTX_LEVEL;

extern "C" const char* PTX_NAME(ptx_handler_, PTX_LEVEL)(int64_t code) {
  return code < i64(sizeof(kTable) / sizeof(kTable[0])) ? kTable[code].name : nullptr;
}

extern "C" int PTX_NAME(ptx_run_, PTX_LEVEL)(void* batch, const void* instructions, int64_t count, const uint8_t* live,
                                             int64_t step) {
  Batch& b = *static_cast<Batch*>(batch);
  const Op* ops = static_cast<const Op*>(instructions);
  for (i64 cta = 0; cta < b.ctas; ++cta) {
    const u8* mask = live == nullptr ? nullptr : live + cta * b.threads;
    if (mask != nullptr) {
      const Lanes lanes = survey(mask, int(b.threads));
      if (!lanes.any) continue;
      if (lanes.all) mask = nullptr;
    }
    Cta c{b, cta, b.registers + cta * b.register_bytes, int(b.threads), step, i32(b.floor)};
    if (!run_cta(c, ops, count, mask)) return 0;
  }
  return 1;
}

extern "C" void* PTX_NAME(ptx_copies_, PTX_LEVEL)(int64_t ctas, int64_t threads) { return new Copies(ctas, threads); }

extern "C" void PTX_NAME(ptx_forget_, PTX_LEVEL)(void* copies) { delete static_cast<Copies*>(copies); }

extern "C" int64_t PTX_NAME(ptx_flying_, PTX_LEVEL)(const void* copies) {
  const Copies& all = *static_cast<const Copies*>(copies);
  i64 count = 0;
  for (i64 cta = 0; cta < all.count; ++cta)
    for (const Copy* one = all.flying[cta]; one; one = one->next) ++count;
  return count;
}

extern "C" void PTX_NAME(ptx_product_, PTX_LEVEL)(void* batch, const void* product) {
  Batch& b = *static_cast<Batch*>(batch);
  const Product& p = *static_cast<const Product*>(product);
  for (i64 cta = 0; cta < b.ctas; ++cta) {
    const Cta c{b, cta, b.registers + cta * b.register_bytes, int(b.threads), 0, 0};
    for (i64 group = 0; group < p.groups; ++group) {
      const i64 at = cta * p.groups + group, size = kRows * p.columns;
      if (p.active[at])
        run_product<false>(c, p, group, c.shared());
      else if (p.old && p.old != p.out)
        std::memcpy(p.out + at * size, p.old + at * size, sizeof(float) * size_t(size));
    }
  }
}

extern "C" void PTX_NAME(ptx_operand_, PTX_LEVEL)(void* batch, const void* operand, const uint8_t* groups,
                                                  int64_t count, int64_t number, int64_t step, int reads) {
  Batch& b = *static_cast<Batch*>(batch);
  const Operand& o = *static_cast<const Operand*>(operand);
  const Op op{0, i32(number), kNone, 0, 0, {}};
  for (i64 cta = 0; cta < b.ctas; ++cta)
    for (i64 group = 0; group < count; ++group) {
      if (!groups[cta * count + group]) continue;
      Cta c{b, cta, nullptr, int(b.threads), step, i32(b.floor)};
      Operands operands(c, op, o, group);
      reads ? operands.read(i32(step)) : operands.were_read(i32(step));
    }
}

extern "C" int PTX_NAME(ptx_walk_, PTX_LEVEL)(void* batch, const void* blocks, int64_t count, const void* ops,
                                              int64_t cta) {
  Batch& b = *static_cast<Batch*>(batch);
  Cta c{b, cta, b.registers + cta * b.register_bytes, int(b.threads), 0, 0};
  if (b.products) b.products->reset();
  b.operands = nullptr;
  const Outcome outcome = walk(c, static_cast<const Block*>(blocks), count, static_cast<const Op*>(ops));
  b.floor = c.floor;
  return outcome;
}

extern "C" void PTX_NAME(ptx_take_, PTX_LEVEL)(void* copies, void* other, int64_t cta, int64_t threads) {
  static_cast<Copies*>(copies)->take(0, *static_cast<Copies*>(other), cta, threads);
}

extern "C" void* PTX_NAME(ptx_products_, PTX_LEVEL)(int64_t watched, int64_t keys, const int32_t* columns,
                                                    int64_t threads) {
  return new Products(watched, keys, columns, threads);
}

extern "C" void PTX_NAME(ptx_drop_, PTX_LEVEL)(void* products) { delete static_cast<Products*>(products); }

extern "C" int PTX_NAME(ptx_idle_, PTX_LEVEL)(const void* products) {
  return static_cast<const Products*>(products)->idle();
}

extern "C" int64_t PTX_NAME(ptx_bytes_, PTX_LEVEL)() { return sizeof(Batch); }
