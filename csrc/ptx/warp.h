// How the threads of a warp exchange values: shfl, vote, activemask, elect, redux.
#pragma once

#include "machine.h"

namespace ptx::PTX_LEVEL {

constexpr u32 kUndefined = 0x7FFF7FFF;  // what a lane gets from one that takes no part

inline bool nothing(Cta&, const Op&, const u8*) { return true; }

enum ShuffleMode { kUp, kDown, kButterfly, kIndex };

// a: 0 the target, 1 the predicate or kNone, 2 the value, 3 and 4 the operands b and c, 5 the mode.
inline bool shuffle(Cta& c, const Op& op, const u8* mask) {
  const u32 *value = c.at<u32>(op.a[2]), *b = c.at<u32>(op.a[3]), *d = c.at<u32>(op.a[4]);
  u32* out = c.at<u32>(op.a[0]);
  u8* inside = op.a[1] == kNone ? nullptr : c.at<u8>(op.a[1]);
  const int mode = op.a[5];
  u32 results[kMostThreads];
  u8 flags[kMostThreads];
  for (int t = 0; t < c.n; ++t) {
    const int lane = t & 31, warp = t & ~31, offset = b[t] & 31, clamp = d[t] & 31, segment = (d[t] >> 8) & 31;
    const int low = lane & segment, high = low | (clamp & ~segment & 31);
    int j;
    bool in;
    if (mode == kUp) {
      j = lane - offset;
      in = j >= high;
    } else {
      j = mode == kDown ? lane + offset : mode == kButterfly ? lane ^ offset : low | (offset & ~segment & 31);
      in = j <= high;
    }
    if (!in) j = lane;
    flags[t] = in;
    results[t] = active(mask, warp + j) ? value[warp + j] : kUndefined;
  }
  for (int t = 0; t < c.n; ++t) {
    if (!active(mask, t)) continue;
    out[t] = results[t];
    if (inside) inside[t] = flags[t];
  }
  return true;
}

enum VoteMode { kBallot, kAny, kAll, kUniform };

// a: 0 the target, 1 the predicate, 2 whether it is negated, 3 the mode.
inline bool vote(Cta& c, const Op& op, const u8* mask) {
  const u8* flag = c.at<u8>(op.a[1]);
  for (int w = 0; w < c.n; w += kWarp) {
    const u32 members = lanes_of(mask, w / kWarp);
    u32 ballot = 0;
    for (int l = 0; l < kWarp; ++l) ballot |= u32((flag[w + l] != 0) != (op.a[2] != 0)) << l;
    ballot &= members;
    const u8 yes = op.a[3] == kAny   ? ballot != 0
                   : op.a[3] == kAll ? ballot == members
                                     : ballot == 0 || ballot == members;
    for (int l = 0; l < kWarp; ++l) {
      if (!active(mask, w + l)) continue;
      if (op.a[3] == kBallot)
        c.at<u32>(op.a[0])[w + l] = ballot;
      else
        c.at<u8>(op.a[0])[w + l] = yes;
    }
  }
  return true;
}

inline bool active_mask(Cta& c, const Op& op, const u8* mask) {
  for (int t = 0; t < c.n; ++t)
    if (active(mask, t)) c.at<u32>(op.a[0])[t] = lanes_of(mask, t / kWarp);
  return true;
}

// a: 0 the leader's lane, 1 whether the thread is it.
inline bool elect(Cta& c, const Op& op, const u8* mask) {
  for (int t = 0; t < c.n; ++t) {
    if (!active(mask, t)) continue;
    const u32 leader = u32(__builtin_ctz(lanes_of(mask, t / kWarp)));
    c.at<u32>(op.a[0])[t] = leader;
    c.at<u8>(op.a[1])[t] = u32(t & 31) == leader;
  }
  return true;
}

}  // namespace ptx::PTX_LEVEL
