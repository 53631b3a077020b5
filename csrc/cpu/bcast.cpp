#include "bcast.h"

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "clip.h"
#include "kernels.h"
#include "require.h"
#include "workspace.h"

namespace cast::cpu {
namespace {

const char* const stream_names[2] = {"spatial", "temporal"};

void check_inputs(const float* const input[2]) {
  for (int s = 0; s < 2; ++s) require(input[s], std::string(stream_names[s]) + " input is missing");
}

void check_parameters(const Problem& p, const Parameters& parameters) {
  static const char* const direction_names[2] = {"t2s", "s2t"};
  for (int s = 0; s < 2; ++s) {
    const auto& own = parameters.stream[s];
    require(own.down_weight && own.down_bias && own.norm_weight && own.norm_bias,
            std::string("a down or norm parameter of the ") + stream_names[s] + " stream is missing");
    if (!has_direction(p, s)) continue;
    const auto& a = parameters.direction[s];
    require(own.up_weight && own.up_bias && a.q_weight && a.q_bias && a.kv_weight && a.kv_bias && a.proj_weight &&
                a.proj_bias,
            std::string("direction ") + direction_names[s] + " is present but one of its parameters is missing");
  }
}

double timed_flops(const Kernels& kernels, i64 rounds, double* seconds) {
  const auto start = std::chrono::steady_clock::now();
  const double flops = kernels.fma_flops(rounds);
  *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return flops;
}

}  // namespace

void check_problem(const Problem& p) {
  require_at_least(0, p.batch, "batch");
  require_at_least(1, p.frames, "frames");
  require_at_least(1, p.patches, "patches");
  require_at_least(1, p.dim, "dim");
  require_at_least(1, p.bottleneck, "bottleneck");
  require_at_least(1, p.heads, "heads");
  require(p.bottleneck % p.heads == 0, "bottleneck is " + std::to_string(p.bottleneck) + ", not a multiple of the " +
                                           std::to_string(p.heads) + " heads");
  for (const int window : p.window)
    require(window >= kAbsent && window <= kSpaceTime,
            "window is " + std::to_string(window) + ", but must be -1 (absent), 0 (time), 1 (space) or 2 (space-time)");
}

i64 saved_per_clip(const Problem& p, Recompute recompute) { return kept_layout(p, recompute).total; }

void run_forward(const ForwardCall& call) {
  const Problem& p = call.problem;
  if (p.batch == 0 || !has_any_direction(p)) return;
  check_inputs(call.input);
  check_parameters(p, call.parameters);
  for (int s = 0; s < 2; ++s) require(!has_direction(p, s) || call.output[s], "an output is missing");
  require(call.saved || saved_per_clip(p, call.recompute) == 0, "the buffer `saved` for backward is missing");
  const Kernels& kernels = selected_kernels();
  const Workspace workspace(kernels.bcast_forward_workspace(p, call.recompute, call.threads));
  kernels.bcast_forward(call, workspace.data());
}

void run_backward(const BackwardCall& call) {
  const Problem& p = call.problem;
  if (p.batch == 0 || !has_any_direction(p)) return;
  check_inputs(call.input);
  check_parameters(p, call.parameters);
  require(call.saved || saved_per_clip(p, call.recompute) == 0, "`saved` of forward is missing");
  for (int s = 0; s < 2; ++s) require(!has_direction(p, s) || call.grad_output[s], "an output gradient is missing");
  const Kernels& kernels = selected_kernels();
  const Workspace workspace(kernels.bcast_backward_workspace(p, call.recompute, call.threads));
  kernels.bcast_backward(call, workspace.data());
}

double measure_fma_ceiling(int threads, double seconds) {
  const Kernels& kernels = selected_kernels();
  double elapsed = 0;
  i64 rounds = 1000;
  while (timed_flops(kernels, rounds, &elapsed), elapsed < 1e-3) rounds *= 2;
  rounds = i64(double(rounds) * seconds / elapsed);
  std::vector<double> flops(threads), times(threads);
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t) team.emplace_back([&, t] { flops[t] = timed_flops(kernels, rounds, &times[t]); });
  for (auto& member : team) member.join();
  double total = 0;
  for (int t = 0; t < threads; ++t) total += flops[t] / times[t];
  return total / 1e9;
}

}  // namespace cast::cpu
