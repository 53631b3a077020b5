// The interface of the native B-CAST for the bindings: checks, scratch memory, and the selected instruction-set level.
#pragma once

#include "problem.h"

namespace cast::cpu {

// Throws std::invalid_argument for sizes that are no B-CAST.
void check_problem(const Problem& problem);

i64 saved_per_clip(const Problem& problem, Recompute recompute);  // floats

// Throws std::invalid_argument for a missing pointer, std::bad_alloc if scratch memory cannot be had.
void run_forward(const ForwardCall& call);
// Writes every gradient with a pointer that is not null; an empty batch writes nothing.
void run_backward(const BackwardCall& call);

// Multiply-add ceiling in GFLOP/s of the selected level with `threads` threads, measured for about `seconds`.
double measure_fma_ceiling(int threads, double seconds);

}  // namespace cast::cpu
