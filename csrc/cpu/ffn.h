// The interface of the native FFN for the bindings: checks, scratch memory, and the selected instruction-set level.
#pragma once

#include "ffn_problem.h"

namespace cast::cpu {

// Throws std::invalid_argument for sizes that are no FFN.
void check_problem(const FFNProblem& problem);

i64 ffn_saved_per_row(const FFNProblem& problem);  // floats

// Throw std::invalid_argument for a missing pointer, std::bad_alloc if scratch memory cannot be had.
void run_ffn_forward(const FFNForwardCall& call);
// Writes every gradient with a pointer that is not null; without rows it writes nothing.
void run_ffn_backward(const FFNBackwardCall& call);

}  // namespace cast::cpu
