#include "bindings.h"

#include "cpu/bcast.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace cast::cpu;

namespace {

using Addresses = std::array<Address, 28>;

Problem make_problem(i64 batch, i64 frames, i64 patches, i64 dim, i64 bottleneck, i64 heads, int t2s_window,
                     int s2t_window, float eps, bool bf16) {
  const Problem p{batch, frames, patches, dim, bottleneck, heads, {t2s_window, s2t_window}, eps, bf16};
  check_problem(p);
  return p;
}

void forward(const Problem& p, Address spatial, Address temporal, Address spatial_scale, Address temporal_scale,
             const Addresses& parameters, Address spatial_out, Address temporal_out, Address saved, int recompute,
             int threads) {
  const ForwardCall call{p,
                         tensors<Parameters>(parameters),
                         {input(spatial), input(temporal)},
                         {input(spatial_scale), input(temporal_scale)},
                         {output(spatial_out), output(temporal_out)},
                         output(saved),
                         checked_recompute(recompute),
                         checked_threads(threads)};
  const py::gil_scoped_release release;
  run_forward(call);
}

void backward(const Problem& p, Address spatial, Address temporal, Address spatial_scale, Address temporal_scale,
              const Addresses& parameters, Address saved, int recompute, Address grad_spatial_out,
              Address grad_temporal_out, Address grad_spatial, Address grad_temporal, const Addresses& gradients,
              int threads) {
  const BackwardCall call{p,
                          tensors<Parameters>(parameters),
                          {input(spatial), input(temporal)},
                          {input(spatial_scale), input(temporal_scale)},
                          input(saved),
                          checked_recompute(recompute),
                          {input(grad_spatial_out), input(grad_temporal_out)},
                          {output(grad_spatial), output(grad_temporal)},
                          tensors<Gradients>(gradients),
                          checked_threads(threads)};
  const py::gil_scoped_release release;
  run_backward(call);
}

double fma_ceiling(int threads, double seconds) {
  checked_threads(threads);
  const py::gil_scoped_release release;
  return measure_fma_ceiling(threads, seconds);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels on raw pointers.";
  py::class_<Problem>(m, "Problem")
      .def(py::init(&make_problem), py::arg("batch"), py::arg("frames"), py::arg("patches"), py::arg("dim"),
           py::arg("bottleneck"), py::arg("heads"), py::arg("t2s_window"), py::arg("s2t_window"), py::arg("eps"),
           py::arg("bf16") = false);
  m.def(
      "saved_per_clip", [](const Problem& p, int recompute) { return saved_per_clip(p, checked_recompute(recompute)); },
      py::arg("problem"), py::arg("recompute"), "Floats that forward keeps of one clip for backward.");
  m.def("bcast_forward", &forward, py::arg("problem"), py::arg("spatial"), py::arg("temporal"),
        py::arg("spatial_scale"), py::arg("temporal_scale"), py::arg("params"), py::arg("spatial_out"),
        py::arg("temporal_out"), py::arg("saved"), py::arg("recompute"), py::arg("threads"));
  m.def("bcast_backward", &backward, py::arg("problem"), py::arg("spatial"), py::arg("temporal"),
        py::arg("spatial_scale"), py::arg("temporal_scale"), py::arg("params"), py::arg("saved"), py::arg("recompute"),
        py::arg("grad_spatial_out"), py::arg("grad_temporal_out"), py::arg("grad_spatial"), py::arg("grad_temporal"),
        py::arg("grad_params"), py::arg("threads"));
  bind_ffn(m);
  bind_self_attention(m);
  m.def(
      "isa", [] { return std::string(selected_kernels().name); },
      "Instruction-set level in use. ValueError if CAST_KERNELS_CPU_ISA is not a level.");
  m.def("built_levels", [] { return std::string(built_levels()); }, "Levels in this build, best first.");
  m.def("measure_fma_ceiling", &fma_ceiling, py::arg("threads"), py::arg("seconds"),
        "Measured multiply-add ceiling of the level in use, GFLOP/s.");
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
