// Compiled once per instruction-set level with that level's flags and CAST_ISA set to its name.
#include "bcast_backward.h"
#include "bcast_forward.h"
#include "ffn_backward.h"
#include "ffn_forward.h"
#include "kernels.h"
#include "self_attention_backward.h"

CAST_ISA_BEGIN

// Ten chains hide the latency of a multiply-add on two ports; every level has registers for them.
double fma_flops(i64 rounds) {
  constexpr int chains = 10;
  vec x[chains];
  for (int i = 0; i < chains; ++i) x[i] = broadcast(float(i));
  vec factor = broadcast(0.999f), term = broadcast(0.001f);
  asm volatile("" : : "g"(&factor), "g"(&term) : "memory");
  for (i64 n = 0; n < rounds; ++n) {
#pragma GCC unroll 10
    for (int i = 0; i < chains; ++i) x[i] = x[i] * factor + term;
  }
  for (int i = 0; i < chains; ++i) asm volatile("" : : "g"(&x[i]) : "memory");
  return double(rounds) * chains * kLanes * 2;
}

CAST_ISA_END

namespace cast::cpu::CAST_ISA {
const Kernels kernels = {CAST_ISA_NAME,
                         forward_workspace,
                         bcast_forward,
                         backward_workspace,
                         bcast_backward,
                         ffn_forward_workspace,
                         ffn_forward,
                         ffn_backward_workspace,
                         ffn_backward,
                         self_attention_workspace,
                         self_attention_forward,
                         self_attention_backward_workspace,
                         self_attention_backward,
                         fma_flops};
}
