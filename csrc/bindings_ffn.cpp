#include "bindings.h"

#include "cpu/ffn.h"

namespace py = pybind11;

namespace cast::cpu {
namespace {

using Addresses = std::array<Address, 10>;

FFNProblem make_problem(i64 rows, i64 dim, i64 hidden, i64 adapter, int activation, bool keep, float eps,
                        float adapter_scale, bool bf16) {
  const FFNProblem p{rows, dim, {hidden, adapter}, activation, keep, eps, adapter_scale, bf16};
  check_problem(p);
  return p;
}

void forward(const FFNProblem& p, Address x, const Addresses& parameters, Address row_scale, Address y, Address saved,
             int threads) {
  const FFNForwardCall call{p,
                            tensors<FFNParameters>(parameters),
                            input(x),
                            input(row_scale),
                            output(y),
                            output(saved),
                            checked_threads(threads)};
  const py::gil_scoped_release release;
  run_ffn_forward(call);
}

void backward(const FFNProblem& p, Address x, const Addresses& parameters, Address row_scale, Address saved,
              Address grad_y, Address grad_x, const Addresses& gradients, int threads) {
  const FFNBackwardCall call{p,
                             tensors<FFNParameters>(parameters),
                             input(x),
                             input(row_scale),
                             input(saved),
                             input(grad_y),
                             output(grad_x),
                             tensors<FFNGradients>(gradients),
                             checked_threads(threads)};
  const py::gil_scoped_release release;
  run_ffn_backward(call);
}

}  // namespace

void bind_ffn(pybind11::module_& m) {
  py::class_<FFNProblem>(m, "FFNProblem")
      .def(py::init(&make_problem), py::arg("rows"), py::arg("dim"), py::arg("hidden"), py::arg("adapter"),
           py::arg("activation"), py::arg("keep"), py::arg("eps"), py::arg("adapter_scale"), py::arg("bf16") = false);
  m.def("ffn_saved_per_row", &ffn_saved_per_row, py::arg("problem"), "Floats that backward needs of one row.");
  m.def("ffn_forward", &forward, py::arg("problem"), py::arg("x"), py::arg("params"), py::arg("row_scale"),
        py::arg("y"), py::arg("saved"), py::arg("threads"));
  m.def("ffn_backward", &backward, py::arg("problem"), py::arg("x"), py::arg("params"), py::arg("row_scale"),
        py::arg("saved"), py::arg("grad_y"), py::arg("grad_x"), py::arg("grad_params"), py::arg("threads"));
}

}  // namespace cast::cpu
