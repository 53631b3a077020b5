// The native FFN as the bindings see it: checks, scratch memory, and the selected instruction-set level.
#pragma once

#include "ffn_problem.h"

namespace cast::cpu {

// Throws std::invalid_argument if the sizes do not make an FFN.
void check_problem(const FFNProblem& problem);

i64 ffn_saved_per_row(const FFNProblem& problem);  // floats

// Throw std::invalid_argument for a missing pointer, std::bad_alloc if scratch memory cannot be had.
void run_ffn_forward(const FFNForwardCall& call);
// Writes every gradient whose pointer is not null; no rows write nothing.
void run_ffn_backward(const FFNBackwardCall& call);

}  // namespace cast::cpu
