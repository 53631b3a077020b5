// Sectors of global memory and wavefronts of shared memory, as Counters counts them.
#pragma once

#include "machine.h"

namespace ptx::PTX_LEVEL {

// Distinct numbers among `count`, of which there are at most 32.
inline int distinct(const i64* values, int count) {
  if (count == 0) return 0;
  int changes = 0;
  bool rising = true;
  for (int i = 1; i < count; ++i) {
    changes += values[i] != values[i - 1];
    rising &= values[i] >= values[i - 1];
  }
  if (rising) return changes + 1;
  i64 found[kWarp];
  int many = 0;
  for (int i = 0; i < count; ++i) {
    bool known = false;
    for (int k = 0; k < many; ++k) known |= found[k] == values[i];
    if (!known) found[many++] = values[i];
  }
  return many;
}

// An access to global memory of `size` bytes by each active thread, at these heap offsets. way: kLoadSectors or kStoreSectors.
inline void count_global(Cta& c, int way, const i64* offsets, const u8* mask, i64 size) {
  i64 sectors = 0, requests = 0, lanes = 0;
  i64 own[kWarp];
  for (int w = 0; w < c.n / kWarp; ++w) {
    int count = 0;
    const i64* at = offsets + w * kWarp;
    if (mask == nullptr) {
      for (int l = 0; l < kWarp; ++l) own[l] = at[l] >> 5;
      count = kWarp;
    } else {
      for (int l = 0; l < kWarp; ++l)
        if (mask[w * kWarp + l]) own[count++] = at[l] >> 5;
    }
    sectors += distinct(own, count);
    requests += count > 0;
    lanes += count;
  }
  i64* counters = c.b.counters + way;
  counters[0] += sectors * (size >= 32 ? size / 32 : 1);
  counters[1] += lanes * size;
  counters[2] += requests;
}

// The largest number of distinct words in one bank, of up to 32 threads.
inline int passes(const i32* units, int count, int banks) {
  u32 used = 0;
  bool same = true;
  for (int i = 0; i < count; ++i) {
    used |= 1u << (units[i] & (banks - 1));
    same &= units[i] == units[0];
  }
  if (same || __builtin_popcount(used) == count) return 1;
  int most = 0, load[kWarp] = {};
  for (int i = 0; i < count; ++i) {
    bool known = false;
    for (int k = 0; k < i; ++k) known |= units[k] == units[i];
    if (known) continue;
    const int bank = units[i] & (banks - 1);
    if (++load[bank] > most) most = load[bank];
  }
  return most;
}

// An access to shared memory. way: kSharedLoadWavefronts or kSharedStoreWavefronts. addresses: of every thread; only
// those of the mask count.
inline void count_shared(Cta& c, int way, const i32* addresses, const u8* mask, i64 size) {
  const int unit = size > 4 ? int(size) : 4, phase = 128 / unit;
  const int shift = unit == 4 ? 2 : unit == 8 ? 3 : 4;
  i64 wavefronts = 0, ideal = 0, requests = 0, lanes = 0;
  i32 own[kWarp];
  for (int w = 0; w < c.n; w += kWarp) {
    int in_warp = 0;
    for (int p = w; p < w + kWarp; p += phase) {
      int count = 0;
      for (int i = p; i < p + phase; ++i)
        if (active(mask, i)) own[count++] = addresses[i] >> shift;
      if (count == 0) continue;
      wavefronts += passes(own, count, phase);
      ++ideal;
      in_warp += count;
    }
    requests += in_warp > 0;
    lanes += in_warp;
  }
  i64* counters = c.b.counters + way;
  counters[0] += wavefronts;
  counters[1] += ideal;
  counters[2] += lanes * size;
  counters[3] += requests;
}

}  // namespace ptx::PTX_LEVEL
