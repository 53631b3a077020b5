// One B-CAST call: sizes, parameter pointers, and a token's place in its window.
//
// Plain data and functions with internal linkage only, for the reason in base.h.
#pragma once

#include "base.h"

namespace cast::cpu {

// A stream and the direction in which it asks share an index: in direction 0 (t2s) stream 0 (spatial) asks and stream 1
// answers, in direction 1 (s2t) the other way round.
enum : int { kSpatial = 0, kTemporal = 1 };
enum : int { kAbsent = -1, kTime = 0, kSpace = 1, kSpaceTime = 2 };

struct Problem {
  i64 batch, frames, patches, dim, bottleneck, heads;
  int window[2];
  float eps;
  bool bf16;  // dense products may round their operands to bfloat16
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
  float* output[2];       // null if the stream receives nothing
  float* saved;           // [B, kept_layout().total], or null
  Recompute recompute;    // defines the fields of `saved`
  int threads;
};

struct BackwardCall {
  Problem problem;
  Parameters parameters;
  const float* input[2];
  const float* scale[2];
  const float* saved;  // null if nothing was kept
  Recompute recompute;
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
  i64 group, index;  // the window, and the position in it
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

// Row tiles and vectors may read up to this much past the last matrix of a region; they never use these values.
static inline i64 read_slack(const Problem& p) { return 16 * p.bottleneck + 64; }

}  // namespace cast::cpu
