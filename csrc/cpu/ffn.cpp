#include "ffn.h"

#include <string>

#include "kernels.h"
#include "require.h"
#include "workspace.h"

namespace cast::cpu {
namespace {

void check_parameters(const FFNProblem& p, const FFNParameters& parameters) {
  static const char* const names[2] = {"FFN", "adapter"};
  require(parameters.norm_weight && parameters.norm_bias, "a LayerNorm parameter is missing");
  for (int b = 0; b < 2; ++b) {
    const auto& own = parameters.branch[b];
    require(!p.width[b] || (own.in_weight && own.in_bias && own.out_weight && own.out_bias),
            std::string("a parameter of the ") + names[b] + " is missing");
  }
}

}  // namespace

void check_problem(const FFNProblem& p) {
  require_at_least(0, p.rows, "rows");
  require_at_least(1, p.dim, "dim");
  require_at_least(1, p.width[kFFN], "hidden");
  require_at_least(0, p.width[kAdapter], "adapter");
  require(p.activation == kGelu || p.activation == kQuickGelu,
          "activation is " + std::to_string(p.activation) + ", but must be 0 (GELU) or 1 (QuickGELU)");
}

i64 ffn_saved_per_row(const FFNProblem& p) { return 2 + (p.keep ? p.width[kFFN] + p.width[kAdapter] : 0); }

void run_ffn_forward(const FFNForwardCall& call) {
  const FFNProblem& p = call.problem;
  if (p.rows == 0) return;
  check_parameters(p, call.parameters);
  require(call.x && call.y, "the input or the output is missing");
  const Kernels& kernels = selected_kernels();
  const Workspace workspace(kernels.ffn_forward_workspace(p, call.threads));
  kernels.ffn_forward(call, workspace.data());
}

void run_ffn_backward(const FFNBackwardCall& call) {
  const FFNProblem& p = call.problem;
  if (p.rows == 0) return;
  check_parameters(p, call.parameters);
  require(call.x && call.grad_y, "the input or the output gradient is missing");
  require(call.saved, "`saved` of forward is missing");
  const Kernels& kernels = selected_kernels();
  const Workspace workspace(kernels.ffn_backward_workspace(call));
  kernels.ffn_backward(call, workspace.data());
}

}  // namespace cast::cpu
