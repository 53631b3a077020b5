// cp.async: the source is read when a copy is issued, shared memory written when it is waited for.
#pragma once

#include "memory.h"

namespace ptx::PTX_LEVEL {

struct Copy {
  Copy* next;
  i64 size;
  int count;
  u16 thread[kMostThreads];
  i32 address[kMostThreads];
  i32 group[kMostThreads];
  u8 data[16 * kMostThreads];
};

// Plain lists: code of the standard library would be shared between instruction-set levels.
struct Copies {
  Copies(i64 ctas, i64 threads)
      : count(ctas), flying(new Copy*[size_t(ctas)]()), group(new i32[size_t(ctas * threads)]()) {}
  Copies(const Copies&) = delete;
  ~Copies() {
    for (i64 cta = 0; cta < count; ++cta) discard(flying[cta]);
    discard(spare);
    delete[] flying;
    delete[] group;
  }

  i64 count;
  Copy** flying;  // of each CTA, in the order of their issue
  i32* group;     // of each thread's next copy
  Copy* spare = nullptr;

  // A copy behind the last of the CTA.
  Copy& add(i64 cta) {
    Copy* one = spare;
    if (one)
      spare = one->next;
    else
      one = new Copy;
    one->next = nullptr;
    Copy** end = flying + cta;
    while (*end) end = &(*end)->next;
    return *(*end = one);
  }
  // Take out the copy that the link points to.
  void remove(Copy** link) {
    Copy* one = *link;
    *link = one->next;
    one->next = spare;
    spare = one;
  }

  // Take over what is in flight of a CTA of another batch.
  void take(i64 cta, Copies& other, i64 from, i64 threads) {
    flying[cta] = other.flying[from];
    other.flying[from] = nullptr;
    std::memcpy(group + cta * threads, other.group + from * threads, sizeof(i32) * size_t(threads));
  }

 private:
  static void discard(Copy* one) {
    while (one) {
      Copy* next = one->next;
      delete one;
      one = next;
    }
  }
};

// The bytes that each active thread wants: a[9] holds an operand and a[10] what it is: 0 none, 1 their number, 2 a
// predicate that none is wanted, 3 its complement. False: more than the copy's size.
inline bool wanted_bytes(const Cta& c, const Op& op, const u8* mask, i64 size, i32* wanted) {
  bool fits = true;
  for (int t = 0; t < c.n; ++t) {
    i64 bytes = size;
    if (op.a[10] == 1) bytes = c.at<u32>(op.a[9])[t];
    if (op.a[10] >= 2) bytes = (c.at<u8>(op.a[9])[t] != 0) == (op.a[10] == 2) ? 0 : size;
    if (!active(mask, t)) bytes = 0;
    fits &= bytes <= size;
    wanted[t] = i32(bytes);
  }
  return fits;
}

// Counts the threads that want `size` bytes and checks them; `align` as for a load, 1 for a part of a copy.
inline bool count_source(Cta& c, const i64* address, const i32* wanted, i64 size, i64 align) {
  u8 takes[kMostThreads];
  i64 offsets[kMostThreads], lanes = 0;
  for (int t = 0; t < c.n; ++t) {
    takes[t] = wanted[t] == size;
    offsets[t] = address[t];
    lanes += takes[t];
  }
  if (lanes == 0) return true;
  if (!global_offsets(c, offsets, takes, size, align)) return false;
  count_global(c, kLoadSectors, offsets, lanes == c.n ? nullptr : takes, size);
  c.b.counters[kAsyncBytes] += size * lanes;
  return true;
}

// a: 0..3 where to, 4..7 where from, 8 the size, 9 and 10 see wanted_bytes.
inline bool copy_issue(Cta& c, const Op& op, const u8* mask) {
  i64 to[kMostThreads], from[kMostThreads];
  i32 wanted[kMostThreads], narrow[kMostThreads];
  const i64 size = op.a[8];
  effective(c, op, 0, to);
  effective(c, op, 4, from);
  if (!shared_inside(c, to, mask, size) || !wanted_bytes(c, op, mask, size, wanted)) return false;
  for (int t = 0; t < c.n; ++t) narrow[t] = i32(to[t]);
  if (!count_source(c, from, wanted, size, size)) return false;
  bool parts = false;
  for (int t = 0; t < c.n; ++t) parts |= wanted[t] != 0 && wanted[t] != size;
  for (i64 part = 1; parts && part < size; ++part)
    if (!count_source(c, from, wanted, part, 1)) return false;
  Access access;
  collect(c, narrow, mask, size, access);
  if (c.b.checks) Checks(c, op).issued(access);
  count_shared(c, kSharedStoreWavefronts, narrow, mask, size);
  Copies& copies = *c.b.copies;
  Copy& copy = copies.add(c.cta);
  copy.size = size;
  copy.count = access.count;
  const i32* group = copies.group + c.cta * c.n;
  for (int i = 0; i < access.count; ++i) {
    const int t = access.thread[i];
    copy.thread[i] = u16(t);
    copy.address[i] = access.address[i];
    copy.group[i] = group[t];
    u8* data = copy.data + i * size;
    const u8* source = c.b.heap + (from[t] - kHeapBase);
    if (wanted[t] == size) {
      size == 16  ? std::memcpy(data, source, 16)
      : size == 8 ? std::memcpy(data, source, 8)
                  : std::memcpy(data, source, 4);
    } else {
      std::memset(data, 0, size_t(size));
      if (wanted[t]) std::memcpy(data, source, size_t(wanted[t]));
    }
  }
  return true;
}

inline bool copy_commit(Cta& c, const Op&, const u8* mask) {
  i32* group = c.b.copies->group + c.cta * c.n;
  for (int t = 0; t < c.n; ++t) group[t] += active(mask, t);
  return true;
}

// a[0]: how many of the newest groups may stay in flight; -1: not even what belongs to none.
inline bool copy_wait(Cta& c, const Op& op, const u8* mask) {
  Copies& copies = *c.b.copies;
  const i32* group = copies.group + c.cta * c.n;
  Checks checks(c, op);
  u8* shared = c.shared();
  for (Copy** link = copies.flying + c.cta; *link;) {
    Copy& copy = **link;
    int kept = 0;
    for (int i = 0; i < copy.count; ++i) {
      const int t = copy.thread[i];
      const u8* data = copy.data + i * copy.size;
      if (active(mask, t) && copy.group[i] < group[t] - op.a[0]) {
        std::memcpy(shared + copy.address[i], data, size_t(copy.size));
        if (c.b.checks) checks.landed(copy.address[i], copy.size, t >> 5);
        continue;
      }
      if (kept != i) {
        copy.thread[kept] = copy.thread[i];
        copy.address[kept] = copy.address[i];
        copy.group[kept] = copy.group[i];
        std::memmove(copy.data + kept * copy.size, data, size_t(copy.size));
      }
      ++kept;
    }
    copy.count = kept;
    if (kept == 0)
      copies.remove(link);
    else
      link = &copy.next;
  }
  return true;
}

}  // namespace ptx::PTX_LEVEL
