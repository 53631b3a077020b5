// The intermediates of one clip: their sizes, their places, and which of them forward keeps for backward.
//
// Queries, keys and values lie [group][head][index][head_dim], so one head of one window is one contiguous matrix.
#pragma once

#include "problem.h"

namespace cast::cpu {

// clang-format off
enum Field : int {
  kQuery, kKey, kValue,    // per direction, T*N*d
  kAttended,               // per direction, [T*N, d], before the output projection
  kRowMax, kInverseSum,    // per direction, [group][head][index], base-2 softmax statistics
  kActivation,             // per direction, [clip_rows, d], before GELU; CLS rows hold the normalised CLS
  kNormed, kRstd,          // per stream, [clip_rows, d] before gamma and beta; [clip_rows]
  kCls,                    // spatial only, [T, d]: the normalised CLS where kActivation has no place
  kFields
};
// clang-format on

static inline i64 field_size(const Problem& p, int field, int which) {
  const i64 matrix = clip_rows(p, which) * p.bottleneck;
  if (field == kNormed) return has_any_direction(p) ? matrix : 0;
  if (field == kRstd) return has_any_direction(p) ? clip_rows(p, which) : 0;
  if (!has_direction(p, which)) return 0;
  if (field == kActivation) return matrix;
  if (field == kRowMax || field == kInverseSum) return patch_tokens(p) * p.heads;
  if (field == kCls) return which == kSpatial ? p.frames * p.bottleneck : 0;
  return patch_tokens(p) * p.bottleneck;
}

// kCheap drops fields that are cheap to repeat: queries, keys and values (12 % of the multiply-adds of forward and
// backward at the paper's size) and attention (2 %).
static inline bool is_kept(Recompute recompute, int field) {
  if (recompute == kAll || field == kCls) return false;
  return recompute == kNothing || field > kAttended;
}

// Offsets in floats inside one clip's region; -1 for a field outside of it.
struct ClipLayout {
  i64 at[kFields][2];
  i64 total;
};

template <class Part>
static inline ClipLayout lay_out(const Problem& p, const Part& is_part) {
  ClipLayout l{};
  for (int field = 0; field < kFields; ++field)
    for (int which = 0; which < 2; ++which) {
      const i64 size = is_part(field) ? field_size(p, field, which) : 0;
      l.at[field][which] = size ? take(l.total, size) : -1;
    }
  if (l.total) l.total += read_slack(p);
  return l;
}

// The fields in `saved`, without gaps. Forward zeroes the slack at the end, so every float of `saved` is defined.
// cast_kernels/cpu/bcast.py computes the same total in Python.
static inline ClipLayout kept_layout(const Problem& p, Recompute recompute) {
  return lay_out(p, [&](int field) { return is_kept(recompute, field); });
}

// The other fields that forward needs. `recompute` is kAll if it keeps nothing.
static inline ClipLayout forward_layout(const Problem& p, Recompute recompute) {
  return lay_out(p, [&](int field) {
    if (field == kCls) return !is_kept(recompute, kActivation);
    return field <= kValue && !is_kept(recompute, field);
  });
}

// The other fields that backward needs: all that were not kept.
static inline ClipLayout backward_layout(const Problem& p, Recompute recompute) {
  return lay_out(p, [&](int field) { return field != kCls && !is_kept(recompute, field); });
}

// Pointers to one clip's fields in either region; null for a field in neither.
struct Clip {
  float* at[kFields][2];
  float* const* operator[](Field field) const { return at[field]; }
};
static inline Clip join(const ClipLayout& kept, float* saved, const ClipLayout& own, float* workspace) {
  Clip clip{};
  for (int field = 0; field < kFields; ++field)
    for (int which = 0; which < 2; ++which)
      clip.at[field][which] = kept.at[field][which] >= 0  ? saved + kept.at[field][which]
                              : own.at[field][which] >= 0 ? workspace + own.at[field][which]
                                                          : nullptr;
  return clip;
}

// The normalised CLS of frame t.
static inline float* cls_row(const Problem& p, const Clip& clip, i64 t) {
  if (float* activation = clip[kActivation][kSpatial]) return activation + t * frame_rows(p, kSpatial) * p.bottleneck;
  return clip[kCls][kSpatial] + t * p.bottleneck;
}

}  // namespace cast::cpu
