// What one B-CAST call is: sizes, parameter pointers and the layout of what forward keeps for backward.
//
// Included by every instruction-set level, so only plain data and internal-linkage functions live here: a shared
// inline function could be merged by the linker into its AVX-512 copy and crash an older machine.
#pragma once

#include "base.h"

namespace cast::cpu {

// Streams and the directions that ask from them share an index: direction 0 (t2s) asks from stream 0 (spatial) and
// is answered by stream 1, direction 1 (s2t) the other way round.
enum : int { kSpatial = 0, kTemporal = 1 };
enum : int { kAbsent = -1, kTime = 0, kSpace = 1, kSpaceTime = 2 };

struct Problem {
  i64 batch, frames, patches, dim, bottleneck, heads;
  int window[2];
  float eps;
};

// T is `const float*` for parameters and `float*` for their gradients (null: not wanted).
template <class T>
struct StreamTensors {
  T down_weight, down_bias, norm_weight, norm_bias, up_weight, up_bias;
};

template <class T>
struct DirectionTensors {
  T q_pos, kv_pos, q_weight, q_bias, kv_weight, kv_bias, proj_weight, proj_bias;
};

// Field order is PARAMETER_NAMES of cast_kernels/problem.py; the bindings copy 28 pointers over it.
template <class T>
struct Tensors {
  StreamTensors<T> stream[2];
  DirectionTensors<T> direction[2];
};
using Parameters = Tensors<const float*>;
using Gradients = Tensors<float*>;
static_assert(sizeof(Parameters) == 28 * sizeof(void*), "28 parameters travel as 28 pointers");

struct ForwardCall {
  Problem problem;
  Parameters parameters;
  const float* input[2];
  const float* scale[2];  // [B, 1+N] and [B], or null
  float* output[2];       // null where the stream receives nothing
  float* saved;           // [B, saved_layout().total], or null
  int threads;
};

struct BackwardCall {
  Problem problem;
  Parameters parameters;
  const float* input[2];
  const float* scale[2];
  const float* saved;
  const float* grad_output[2];
  float* grad_input[2];
  Gradients gradients;
  int threads;
};

static inline bool has_direction(const Problem& p, int direction) { return p.window[direction] != kAbsent; }
static inline bool has_any_direction(const Problem& p) { return has_direction(p, 0) || has_direction(p, 1); }
static inline i64 head_dim(const Problem& p) { return p.bottleneck / p.heads; }
static inline i64 patch_tokens(const Problem& p) { return p.frames * p.patches; }
// Tokens of a frame in a stream: the spatial stream carries CLS in front.
static inline i64 frame_rows(const Problem& p, int stream) { return p.patches + (stream == kSpatial ? 1 : 0); }
static inline i64 clip_rows(const Problem& p, int stream) { return p.frames * frame_rows(p, stream); }

static inline i64 window_length(const Problem& p, int direction) {
  if (p.window[direction] == kTime) return p.frames;
  return p.window[direction] == kSpace ? p.patches : patch_tokens(p);
}
static inline i64 window_groups(const Problem& p, int direction) {
  if (p.window[direction] == kTime) return p.patches;
  return p.window[direction] == kSpace ? p.frames : 1;
}

struct Slot {
  i64 group, index;  // which window, and the position in it
};
static inline Slot slot_of(const Problem& p, int direction, i64 t, i64 n) {
  if (p.window[direction] == kTime) return {n, t};
  if (p.window[direction] == kSpace) return {t, n};
  return {0, t * p.patches + n};
}
// The inverse of slot_of: the token's index t * N + n.
static inline i64 token_of(const Problem& p, int direction, i64 group, i64 index) {
  if (p.window[direction] == kTime) return index * p.patches + group;
  return group * p.patches + index;  // space: (t, n); space-time: group is 0
}

// Offsets in floats inside one clip's region. Queries, keys and values lie [group][head][index][head_dim], so one
// head of one window is one contiguous matrix.
struct ClipLayout {
  i64 query[2], key[2], value[2];     // T*N*d
  i64 row_max[2], inverse_sum[2];     // [group][head][index], base-2 softmax statistics
  i64 attended[2];                    // [T*N, d], before the output projection
  i64 activation[2];                  // [clip_rows, d], before GELU; CLS rows hold the normalised CLS
  i64 normed[2], rstd[2];             // [clip_rows, d] before gamma and beta; [clip_rows]
  i64 cls, cls_stride;                // normalised CLS of frame t at cls + t * cls_stride
  i64 total;
};

// Row tiles and vectors may read (never use) up to this much past the last matrix.
static inline i64 read_slack(const Problem& p) { return 16 * p.bottleneck + 64; }

// What backward needs of a clip, without gaps up to the slack at the end, which forward zeroes: every float of it is
// defined. cast_kernels/cpu/bcast.py computes the same total in Python.
static inline ClipLayout saved_layout(const Problem& p) {
  ClipLayout l{};
  i64 at = 0;
  const i64 tokens = patch_tokens(p), d = p.bottleneck;
  for (int a = 0; a < 2; ++a) {
    if (!has_direction(p, a)) continue;
    l.query[a] = take(at, tokens * d);
    l.key[a] = take(at, tokens * d);
    l.value[a] = take(at, tokens * d);
    l.attended[a] = take(at, tokens * d);
    l.row_max[a] = take(at, tokens * p.heads);
    l.inverse_sum[a] = take(at, tokens * p.heads);
    l.activation[a] = take(at, clip_rows(p, a) * d);
  }
  for (int s = 0; s < 2 && has_any_direction(p); ++s) {
    l.normed[s] = take(at, clip_rows(p, s) * d);
    l.rstd[s] = take(at, clip_rows(p, s));
  }
  l.cls = l.activation[kSpatial];
  l.cls_stride = frame_rows(p, kSpatial) * d;
  l.total = at + (has_any_direction(p) ? read_slack(p) : 0);
  return l;
}

// The same without what only backward reads: forward reuses one such region per clip in flight.
static inline ClipLayout scratch_layout(const Problem& p) {
  ClipLayout l{};
  i64 at = 0;
  const i64 tokens = patch_tokens(p), d = p.bottleneck;
  for (int a = 0; a < 2; ++a) {
    if (!has_direction(p, a)) continue;
    l.query[a] = take(at, tokens * d);
    l.key[a] = take(at, tokens * d);
    l.value[a] = take(at, tokens * d);
  }
  l.cls = take(at, p.frames * d);
  l.cls_stride = d;
  l.total = at + read_slack(p);
  return l;
}

}  // namespace cast::cpu
