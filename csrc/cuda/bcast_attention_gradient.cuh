// The products of attention's gradient: a warp's 16 queries against 16 keys, or its 16 keys against 16 queries.
#pragma once
#include "bcast_windows.cuh"

namespace cast::cuda {

constexpr int MOST_HEADS = CHANNELS / 16;

// What queries need beside their rows, for each head: P = 2^(s - level), and delta.
struct Levels {
  float level[MOST_HEADS][BLOCK], delta[MOST_HEADS][BLOCK];
};

// delta = rowsum(dO O) of 64 queries. A thread has half of a row's 64 channels.
template <class T, int HEAD>
CAST_DEVICE void sum_deltas(Levels& to, const unsigned char* o, const unsigned char* grad_o) {
  constexpr int HALF = CHANNELS / 2, OWN = HEAD < HALF ? HALF / HEAD : 1;  // heads of a thread
  const int query = threadIdx.x / 2, half = threadIdx.x % 2;
  float sums[OWN] = {};
#pragma unroll
  for (int c = 0; c < HALF / 8; ++c) {
    const uint32_t at = swizzled(query, half * HALF / 8 + c);
    const uint4 left = *reinterpret_cast<const uint4*>(o + at), right = *reinterpret_cast<const uint4*>(grad_o + at);
    const uint32_t lefts[4] = {left.x, left.y, left.z, left.w}, rights[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack<T>(lefts[i]), b = unpack<T>(rights[i]);
      sums[8 * c / (HALF / OWN)] += a.x * b.x + a.y * b.y;
    }
  }
  if constexpr (HEAD > HALF) {
    sums[0] += __shfl_xor_sync(~0u, sums[0], 1);
    if (half == 0) to.delta[0][query] = sums[0];
  } else {
#pragma unroll
    for (int h = 0; h < OWN; ++h) to.delta[half * OWN + h][query] = sums[h];
  }
}

// No probability where column and row are not of one window.
CAST_DEVICE void hide(float (&p)[2][4], int first, const int (&low)[2], int window, const Place& place) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const unsigned inside = first + 8 * n + place.column + e % 2 - low[e / 2];
      if (inside >= static_cast<unsigned>(window)) p[n][e] = 0.f;
    }
}

// Scores and dP of a warp's 16 queries against 16 keys.
template <class T, int HEAD>
struct Queries {
  uint32_t q[HEAD / 4], grad_o[HEAD / 4];
  float grad_q[HEAD / 8][4] = {};
  float level[2], delta[2] = {};

  // p = P, dp = dP; zero outside of the window. `all`: every query of the warp sees all 16 keys.
  CAST_DEVICE void scores(float (&p)[2][4], float (&dp)[2][4], uint32_t k, uint32_t v, int line, int channel,
                          int first_key, bool all, const int (&low)[2], int window, float scale,
                          const Place& place) const {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) p[n][e] = dp[n][e] = 0.f;
    multiply_rows<T, HEAD>(p, q, k, line, channel, place.lane);
    multiply_rows<T, HEAD>(dp, grad_o, v, line, channel, place.lane);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) p[n][e] = exp2_approximate(fmaf(p[n][e], scale, -level[e / 2]));
    if (!all) hide(p, first_key, low, window, place);
  }

  // grad_q += P (dP - delta) K
  CAST_DEVICE void add(float (&p)[2][4], const float (&dp)[2][4], uint32_t k, int line, int channel, int lane) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) p[n][e] *= dp[n][e] - delta[e / 2];
    uint32_t ds[4];
    as_operand<T>(ds, p);
    multiply_columns<T, HEAD>(grad_q, ds, k, line, channel, lane);
  }
};

// The same of a warp's 16 keys, with scores transposed: columns are queries.
template <class T, int HEAD>
struct Keys {
  uint32_t k[HEAD / 4], v[HEAD / 4];
  float grad_k[HEAD / 8][4] = {}, grad_v[HEAD / 8][4] = {};

  CAST_DEVICE void add(uint32_t q, uint32_t grad_o, const float* level, const float* delta, int line, int channel,
                       int first_query, bool all, const int (&low)[2], int window, float scale, const Place& place) {
    float p[2][4] = {}, dp[2][4] = {};
    multiply_rows<T, HEAD>(p, k, q, line, channel, place.lane);
    multiply_rows<T, HEAD>(dp, v, grad_o, line, channel, place.lane);
    uint32_t left[4];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * n + place.column + e % 2;
        p[n][e] = exp2_approximate(fmaf(p[n][e], scale, -level[line + column]));
      }
    if (!all) hide(p, first_query, low, window, place);
    as_operand<T>(left, p);
    multiply_columns<T, HEAD>(grad_v, left, grad_o, line, channel, place.lane);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) p[n][e] *= dp[n][e] - delta[line + 8 * n + place.column + e % 2];
    as_operand<T>(left, p);
    multiply_columns<T, HEAD>(grad_k, left, q, line, channel, place.lane);
  }
};

}  // namespace cast::cuda
