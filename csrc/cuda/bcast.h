// B-CAST on a GPU: what one call is, and what its launches need. Sizes, grids and arguments are decided here, once, for
// the GPU and for whoever records launches.
#pragma once
#include <array>
#include <cstdint>

#include "launch.h"

namespace cast::cuda {

enum class Window { none = -1, time = 0, space = 1, space_time = 2 };

// What backward computes again, as cast_kernels.problem.Recompute; `unkept` where no backward follows.
enum class Recompute { nothing = 0, cheap = 1, all = 2, unkept = 3 };

struct Problem {
  int batch, frames, patches, dim, bottleneck, heads;
  Window windows[2];  // of t2s, which the spatial stream asks, and of s2t
  Number compute;  // of products
  Number streams, parameters;  // of x and y, and of all parameters: the compute type or fp32
  float eps;

  int stream_rows(int stream) const { return batch * frames * (patches + (stream == 0)); }
};

// The order of cast_kernels.problem.PARAMETER_NAMES; 0 where one is absent.
struct StreamParameters {
  Address down_weight, down_bias, norm_weight, norm_bias, up_weight, up_bias;
};
struct WayParameters {
  Address q_pos, kv_pos, q_weight, q_bias, kv_weight, kv_bias, proj_weight, proj_bias;
};
struct Parameters {
  StreamParameters streams[2];
  WayParameters ways[2];
};

struct ForwardCall {
  Problem problem;
  Parameters parameters;
  std::array<Address, 2> x, y, scale;  // spatial, temporal; y of a stream that receives nothing is not written
  Recompute recompute;
  Address saved, scratch;  // of saved_bytes and forward_scratch_bytes
  int multiprocessors;  // of the GPU: how rows that fill no round of CTAs are shared; no bit depends on it
  Address stream;  // of the GPU
};

struct BackwardCall {
  Problem problem;
  Parameters parameters;
  std::array<Address, 2> x, scale, grad_y;  // grad_y of a stream that receives nothing is not read
  Recompute recompute;
  Address saved, scratch;
  std::array<Address, 2> grad_x;  // 0 where it is not wanted
  Parameters gradients;  // the same
  int multiprocessors;  // of the GPU: into how many parts sums over rows are cut
  Address stream;
};

// Bytes that forward keeps for backward.
std::uint64_t saved_bytes(const Problem& problem, Recompute recompute);
// Bytes that live as long as a call.
std::uint64_t forward_scratch_bytes(const Problem& problem, Recompute recompute);
std::uint64_t backward_scratch_bytes(const Problem& problem, Recompute recompute, int multiprocessors);
// Make all launches of a forward, or those of a backward that lead to a wanted gradient.
void forward(const ForwardCall& call);
void backward(const BackwardCall& call);

}  // namespace cast::cuda
