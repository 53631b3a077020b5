// The table of entry points that one instruction-set level exports.
#pragma once

#include "ffn_problem.h"
#include "problem.h"
#include "self_attention.h"

namespace cast::cpu {

struct Kernels {
  const char* name;
  // Sizes in floats.
  i64 (*bcast_forward_workspace)(const Problem&, Recompute, int threads);
  void (*bcast_forward)(const ForwardCall&, float* workspace);
  i64 (*bcast_backward_workspace)(const Problem&, Recompute, int threads);
  void (*bcast_backward)(const BackwardCall&, float* workspace);
  i64 (*ffn_forward_workspace)(const FFNProblem&, int threads);
  void (*ffn_forward)(const FFNForwardCall&, float* workspace);
  i64 (*ffn_backward_workspace)(const FFNBackwardCall&);
  void (*ffn_backward)(const FFNBackwardCall&, float* workspace);
  i64 (*self_attention_workspace)(const SelfAttentionProblem&, bool save, int threads);
  void (*self_attention)(const SelfAttentionForward&, float* workspace);
  i64 (*self_attention_backward_workspace)(const SelfAttentionProblem&, int threads);
  void (*self_attention_backward)(const SelfAttentionBackward&, float* workspace);
  double (*fma_flops)(i64 rounds);  // does `rounds` rounds of independent multiply-adds; returns their flops
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

// The best level that this processor, the build and CAST_KERNELS_CPU_ISA allow. Throws std::invalid_argument for an
// unknown value of the variable.
const Kernels& selected_kernels();

// Names of the levels in this build, comma-separated.
const char* built_levels();

}  // namespace cast::cpu
