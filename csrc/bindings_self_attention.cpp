#include "bindings.h"

#include "cpu/self_attention.h"

namespace py = pybind11;

namespace cast::cpu {
namespace {

using Addresses = std::array<Address, 10>;

SelfAttentionProblem make_problem(i64 batch, i64 tokens, i64 dim, i64 heads, i64 adapter, int recompute, float eps,
                                  bool bf16) {
  const SelfAttentionProblem p{batch, tokens, dim, heads, adapter, checked_recompute(recompute), eps, bf16};
  check_problem(p);
  return p;
}

void forward(const SelfAttentionProblem& p, Address x, const Addresses& parameters, Address y, Address saved,
             int threads) {
  const SelfAttentionForward call{
      p, tensors<SelfAttentionParameters>(parameters), input(x), output(y), output(saved), checked_threads(threads)};
  const py::gil_scoped_release release;
  run_self_attention(call);
}

void backward(const SelfAttentionProblem& p, Address x, const Addresses& parameters, Address saved, Address grad_y,
              Address grad_x, const Addresses& gradients, int threads) {
  const SelfAttentionBackward call{p,
                                   tensors<SelfAttentionParameters>(parameters),
                                   input(x),
                                   input(saved),
                                   input(grad_y),
                                   output(grad_x),
                                   tensors<SelfAttentionGradients>(gradients),
                                   checked_threads(threads)};
  const py::gil_scoped_release release;
  run_self_attention_backward(call);
}

}  // namespace

void bind_self_attention(pybind11::module_& m) {
  py::class_<SelfAttentionProblem>(m, "SelfAttentionProblem")
      .def(py::init(&make_problem), py::arg("batch"), py::arg("tokens"), py::arg("dim"), py::arg("heads"),
           py::arg("adapter"), py::arg("recompute"), py::arg("eps"), py::arg("bf16") = false);
  m.def("self_attention_saved", &self_attention_saved, py::arg("problem"), "Floats that backward needs.");
  m.def("self_attention_forward", &forward, py::arg("problem"), py::arg("x"), py::arg("params"), py::arg("y"),
        py::arg("saved"), py::arg("threads"));
  m.def("self_attention_backward", &backward, py::arg("problem"), py::arg("x"), py::arg("params"), py::arg("saved"),
        py::arg("grad_y"), py::arg("grad_x"), py::arg("grad_params"), py::arg("threads"));
}

}  // namespace cast::cpu
