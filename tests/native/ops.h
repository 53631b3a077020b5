// Every op of the native core, each tested by the file of its name.
#pragma once

#include "trial.h"

namespace cast::test {

Op bcast_op();
Op ffn_op();
Op self_attention_op();

inline std::vector<Op> all_ops() { return {bcast_op(), ffn_op(), self_attention_op()}; }

// The core's lists of fixed size refuse one job too many; see job_lists.cpp.
void check_job_lists();

}  // namespace cast::test
