#include "bcast_draft.h"

namespace cast::cuda {
namespace {

class Forward : Draft {
 public:
  explicit Forward(const ForwardCall& call)
      : Draft({call.problem, call.parameters, call.x, call.scale, call.recompute, call.saved, call.scratch,
               call.multiprocessors, call.stream},
              false),
        call_(call) {
    prepare_projection();
    prepare_exchange(true);
  }
  using Draft::saved_bytes;
  using Draft::scratch_bytes;

  void run() {
    prepare();
    project(false);
    attend();
    exchange(call_.y, false);
  }

 private:
  const ForwardCall& call_;
};

ForwardCall without_addresses(const Problem& problem, Recompute recompute) {
  ForwardCall call{};
  call.problem = problem;
  call.recompute = recompute;
  return call;
}

}  // namespace

std::uint64_t saved_bytes(const Problem& problem, Recompute recompute) {
  const ForwardCall call = without_addresses(problem, recompute);
  return Forward(call).saved_bytes();
}

std::uint64_t forward_scratch_bytes(const Problem& problem, Recompute recompute) {
  const ForwardCall call = without_addresses(problem, recompute);
  return Forward(call).scratch_bytes();
}

void forward(const ForwardCall& call) {
  if (call.problem.windows[0] == Window::none && call.problem.windows[1] == Window::none) return;
  Forward(call).run();
}

}  // namespace cast::cuda
