#include "self_attention.h"

#include <string>

#include "kernels.h"
#include "require.h"
#include "workspace.h"

namespace cast::cpu {
namespace {

void check_parameters(const SelfAttentionProblem& p, const SelfAttentionParameters& w) {
  require(w.norm_weight && w.norm_bias && w.qkv_weight && w.proj_weight && w.proj_bias,
          "a LayerNorm, query-key-value or projection parameter is missing");
  require(!p.adapter || (w.down_weight && w.down_bias && w.up_weight && w.up_bias),
          "a parameter of the adapter is missing");
}

}  // namespace

void check_problem(const SelfAttentionProblem& p) {
  require_at_least(0, p.batch, "batch");
  require_at_least(1, p.tokens, "tokens");
  require_at_least(1, p.dim, "dim");
  require_at_least(1, p.heads, "heads");
  require_at_least(0, p.adapter, "adapter");
  require(p.dim % p.heads == 0,
          "dim is " + std::to_string(p.dim) + ", not a multiple of the " + std::to_string(p.heads) + " heads");
}

i64 self_attention_saved(const SelfAttentionProblem& p) { return saved_layout(p).total; }

void run_self_attention(const SelfAttentionForward& call) {
  const SelfAttentionProblem& p = call.problem;
  check_parameters(p, call.parameters);
  if (p.batch == 0) return;
  require(call.input && call.output, "the input or the output is missing");
  const Kernels& kernels = selected_kernels();
  const Workspace workspace(kernels.self_attention_workspace(p, call.saved != nullptr, call.threads));
  kernels.self_attention(call, workspace.data());
}

void run_self_attention_backward(const SelfAttentionBackward& call) {
  const SelfAttentionProblem& p = call.problem;
  check_parameters(p, call.parameters);
  if (p.batch == 0) return;
  require(call.input && call.grad_output, "the input or the output's gradient is missing");
  require(call.saved, "`saved` of forward is missing");
  const Kernels& kernels = selected_kernels();
  const Workspace workspace(kernels.self_attention_backward_workspace(p, call.threads));
  kernels.self_attention_backward(call, workspace.data());
}

}  // namespace cast::cpu
