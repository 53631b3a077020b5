// ld and st: global and shared memory, parameters and constants.
#pragma once

#include "checks.h"
#include "counts.h"

namespace ptx::PTX_LEVEL {

// The offset of an address operand is in a[i + 2] (low) and a[i + 3] (high), its register in a[i], the register's width in a[i + 1].
inline void effective(const Cta& c, const Op& op, int i, i64* out) {
  const i64 offset = i64(u64(u32(op.a[i + 2])) | u64(u32(op.a[i + 3])) << 32);
  if (op.a[i + 1] == 8) {
    const i64* base = c.at<i64>(op.a[i]);
    for (int t = 0; t < c.n; ++t) out[t] = base[t] + offset;
  } else {
    const u32* base = c.at<u32>(op.a[i]);
    for (int t = 0; t < c.n; ++t) out[t] = i64(base[t]) + offset;
  }
}

// Whether each active access begins `size` bytes inside one buffer and is aligned. Turns addresses into heap offsets.
inline bool global_offsets(const Cta& c, i64* address, const u8* mask, i64 size, i64 align) {
  i64 low = INT64_MAX, high = INT64_MIN, bits = 0;
  for (int t = 0; t < c.n; ++t) {
    const i64 at = address[t] -= kHeapBase;
    if (!active(mask, t)) continue;
    low = at < low ? at : low;
    high = at > high ? at : high;
    bits |= at;
  }
  if (high < low) return true;
  if (bits & (align - 1)) return false;
  const Batch& b = c.b;
  i64 first = 0, last = b.buffers;
  while (first < last) {
    const i64 middle = (first + last) / 2;
    if (b.starts[middle] <= low)
      first = middle + 1;
    else
      last = middle;
  }
  if (first == 0) return false;
  if (high + size <= b.stops[first - 1]) return true;
  for (int t = 0; t < c.n; ++t) {
    if (!active(mask, t)) continue;
    i64 k = 0;
    while (k < b.buffers && b.starts[k] <= address[t]) ++k;
    if (k == 0 || address[t] + size > b.stops[k - 1]) return false;
  }
  return true;
}

inline bool shared_inside(const Cta& c, const i64* address, const u8* mask, i64 size) {
  i64 low = INT64_MAX, high = INT64_MIN, bits = 0;
  for (int t = 0; t < c.n; ++t) {
    if (!active(mask, t)) continue;
    low = address[t] < low ? address[t] : low;
    high = address[t] > high ? address[t] : high;
    bits |= address[t];
  }
  return high < low || (low >= kSharedBase && high + size <= c.b.shared_end && (bits & (size - 1)) == 0);
}

inline void collect(const Cta& c, const i32* address, const u8* mask, i64 size, Access& access) {
  access.size = size;
  if (mask == nullptr) {
    access.count = c.n;
    std::memcpy(access.address, address, sizeof(i32) * size_t(c.n));
    for (int t = 0; t < c.n; ++t) access.thread[t] = u16(t);
    return;
  }
  int count = 0;
  for (int t = 0; t < c.n; ++t) {
    access.address[count] = address[t];
    access.thread[count] = u16(t);
    count += mask[t] != 0;
  }
  access.count = count;
}

template <class T>
T load_at(const u8* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

template <class T>
void store_at(u8* at, T value) {
  std::memcpy(at, &value, sizeof(T));
}

// Elements of type T from base + address + k * sizeof(T) to registers of type O. outs: a list of operands.
template <class T, class O, class I>
inline void fill(const Cta& c, const u8* base, const I* address, const u8* mask, const i32* outs, int count) {
  for (int k = 0; k < count; ++k) {
    O* o = c.at<O>(outs[k]);
    const u8* from = base + k * sizeof(T);
    if (mask == nullptr) {
      for (int t = 0; t < c.n; ++t) o[t] = O(load_at<T>(from + address[t]));
    } else {
      for (int t = 0; t < c.n; ++t)
        if (mask[t]) o[t] = O(load_at<T>(from + address[t]));
    }
  }
}

// a: 0..3 the address, 4 the number of elements, 5 their list.
template <class T, class O>
bool load_global(Cta& c, const Op& op, const u8* mask) {
  i64 address[kMostThreads];
  effective(c, op, 0, address);
  const int count = op.a[4];
  const i64 size = i64(sizeof(T)) * count;
  if (!global_offsets(c, address, mask, size, size)) return false;
  count_global(c, kLoadSectors, address, mask, size);
  fill<T, O>(c, c.b.heap, address, mask, c.list(op.a[5]), count);
  return true;
}

template <class T, class O>
bool load_shared(Cta& c, const Op& op, const u8* mask) {
  i64 address[kMostThreads];
  i32 narrow[kMostThreads];
  effective(c, op, 0, address);
  const int count = op.a[4];
  const i64 size = i64(sizeof(T)) * count;
  if (!shared_inside(c, address, mask, size)) return false;
  for (int t = 0; t < c.n; ++t) narrow[t] = i32(address[t]);
  if (c.b.checks) {
    Access access;
    collect(c, narrow, mask, size, access);
    Checks(c, op).read(access);
  }
  count_shared(c, kSharedLoadWavefronts, narrow, mask, size);
  fill<T, O>(c, c.shared(), narrow, mask, c.list(op.a[5]), count);
  return true;
}

// From the parameters, a[6] = 0, or the constants, 1.
template <class T, class O>
bool load_bank(Cta& c, const Op& op, const u8* mask) {
  i64 address[kMostThreads];
  effective(c, op, 0, address);
  const u8* bank = op.a[6] ? c.b.bank : c.b.parameters;
  const i64 bytes = op.a[6] ? c.b.bank_bytes : c.b.parameter_bytes;
  const int count = op.a[4];
  for (int t = 0; t < c.n; ++t) {
    if (!active(mask, t)) continue;
    if (address[t] < 0 || address[t] + i64(sizeof(T)) * count > bytes || address[t] % i64(sizeof(T))) return false;
  }
  fill<T, O>(c, bank, address, mask, c.list(op.a[5]), count);
  return true;
}

// a: 0..3 the address, 4 the number of elements, 5 their list. Of threads that write one place the highest wins.
template <class T, class R>
bool store_global(Cta& c, const Op& op, const u8* mask) {
  i64 address[kMostThreads];
  effective(c, op, 0, address);
  const int count = op.a[4];
  const i64 size = i64(sizeof(T)) * count;
  if (!global_offsets(c, address, mask, size, size)) return false;
  count_global(c, kStoreSectors, address, mask, size);
  const i32* values = c.list(op.a[5]);
  for (int k = 0; k < count; ++k) {
    const R* value = c.at<R>(values[k]);
    u8* to = c.b.heap + k * sizeof(T);
    for (int t = 0; t < c.n; ++t)
      if (active(mask, t)) store_at(to + address[t], T(value[t]));
  }
  return true;
}

// How far a word is from another: `apart` of the interpreter.
template <class T>
int apart(T held, T value) {
  if (held == value) return 0;
  if (sizeof(T) != 4) return 2;
  const i64 one = u32(held), other = u32(value);
  const auto normal = [](i64 bits) { return ((bits >> 23) & 255) != 0 && ((bits >> 23) & 255) != 255; };
  const i64 between = one < other ? other - one : one - other;
  return normal(one) && normal(other) && one >> 31 == other >> 31 && between <= kRounding ? 1 : 2;
}

template <class T, class R>
bool store_shared(Cta& c, const Op& op, const u8* mask) {
  i64 address[kMostThreads];
  i32 narrow[kMostThreads];
  effective(c, op, 0, address);
  const int count = op.a[4];
  const i64 size = i64(sizeof(T)) * count;
  if (!shared_inside(c, address, mask, size)) return false;
  for (int t = 0; t < c.n; ++t) narrow[t] = i32(address[t]);
  count_shared(c, kSharedStoreWavefronts, narrow, mask, size);
  const R* values[8];
  for (int k = 0; k < count; ++k) values[k] = c.at<R>(c.list(op.a[5])[k]);
  Access access;
  u8* shared = c.shared();
  collect(c, narrow, mask, size, access);
  const auto differs = [&](int i) {
    int far = 0;
    for (int k = 0; k < count; ++k)
      far =
          std::max(far, apart(load_at<T>(shared + access.address[i] + k * sizeof(T)), T(values[k][access.thread[i]])));
    return far;
  };
  Checks checks(c, op);
  if (c.b.checks) checks.write(access, differs);
  for (int k = 0; k < count; ++k)
    for (int i = 0; i < access.count; ++i)
      store_at(shared + access.address[i] + k * sizeof(T), T(values[k][access.thread[i]]));
  if (c.b.checks) checks.wrote(access, differs);
  return true;
}

}  // namespace ptx::PTX_LEVEL
