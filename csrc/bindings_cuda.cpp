// The Python module cast_kernels._cuda: B-CAST's launches and the embedded kernels. No torch header; the first launch
// opens the driver.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "bindings_cuda_tensors.h"
#include "cuda/row_tiles.h"

namespace py = pybind11;
using namespace cast::cuda;

namespace {

Number number(const std::string& name) {
  for (const Number type : {Number::bf16, Number::fp16, Number::fp32})
    if (name == name_of(type)) return type;
  throw py::value_error("a number is " + name + ", but must be bf16, fp16 or fp32");
}

Problem make_problem(int batch, int frames, int patches, int dim, int bottleneck, int heads, int t2s_window,
                     int s2t_window, const std::string& compute, const std::string& streams,
                     const std::string& parameters, float eps) {
  return {batch,
          frames,
          patches,
          dim,
          bottleneck,
          heads,
          {Window(t2s_window), Window(s2t_window)},
          number(compute),
          number(streams),
          number(parameters),
          eps};
}

void run_forward(const Problem& problem, const std::array<Address, 2>& x, const std::array<Address, 28>& parameters,
                 const std::array<Address, 2>& scale, const std::array<Address, 2>& y, int recompute, Address saved,
                 Address scratch, int multiprocessors, Address stream) {
  ForwardCall call{problem, {}, x, y, scale, Recompute(recompute), saved, scratch, multiprocessors, stream};
  static_assert(sizeof(call.parameters) == sizeof(parameters), "one address a parameter");
  std::memcpy(&call.parameters, parameters.data(), sizeof(parameters));
  if (is_recorded()) return forward(call);  // the recorder is a Python function and needs the GIL
  const py::gil_scoped_release release;
  forward(call);
}

void run_backward(const Problem& problem, const std::array<Address, 2>& x, const std::array<Address, 28>& parameters,
                  const std::array<Address, 2>& scale, const std::array<Address, 2>& grad_y, int recompute,
                  Address saved, Address scratch, const std::array<Address, 2>& grad_x,
                  const std::array<Address, 28>& gradients, int multiprocessors, Address stream) {
  BackwardCall call{problem, {},      x,      scale, grad_y,          Recompute(recompute),
                    saved,   scratch, grad_x, {},    multiprocessors, stream};
  std::memcpy(&call.parameters, parameters.data(), sizeof(parameters));
  std::memcpy(&call.gradients, gradients.data(), sizeof(gradients));
  if (is_recorded()) return backward(call);
  const py::gil_scoped_release release;
  backward(call);
}

py::dict as_dict(const Launch& launch) {
  py::list places;
  for (const Place& place : launch.places) {
    py::dict one(py::arg("at") = place.at, py::arg("address") = place.address, py::arg("bytes") = place.bytes);
    if (place.is_map) {
      one["type"] = name_of(place.map.type);
      one["sizes"] = py::make_tuple(place.map.columns, place.map.rows);
      one["box"] = py::make_tuple(place.map.box_columns, place.map.box_rows);
    }
    places.append(one);
  }
  return py::dict(py::arg("kernel") = launch.kernel, py::arg("grid") = launch.grid, py::arg("threads") = launch.threads,
                  py::arg("cluster") = launch.cluster, py::arg("shared_bytes") = launch.shared_bytes,
                  py::arg("argument") = py::bytes(launch.argument.data(), launch.argument.size()),
                  py::arg("places") = places);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  py::class_<Problem>(m, "Problem")
      .def(py::init(&make_problem), py::arg("batch"), py::arg("frames"), py::arg("patches"), py::arg("dim"),
           py::arg("bottleneck"), py::arg("heads"), py::arg("t2s_window"), py::arg("s2t_window"), py::arg("compute"),
           py::arg("streams"), py::arg("parameters"), py::arg("eps"));
  m.def("saved_bytes", [](const Problem& p, int recompute) { return saved_bytes(p, Recompute(recompute)); });
  m.def("forward_scratch_bytes",
        [](const Problem& p, int recompute) { return forward_scratch_bytes(p, Recompute(recompute)); });
  m.def("forward", &run_forward, py::arg("problem"), py::arg("x"), py::arg("parameters"), py::arg("scale"),
        py::arg("y"), py::arg("recompute"), py::arg("saved"), py::arg("scratch"), py::arg("multiprocessors"),
        py::arg("stream"));
  m.def("backward_scratch_bytes", [](const Problem& p, int recompute, int multiprocessors) {
    return backward_scratch_bytes(p, Recompute(recompute), multiprocessors);
  });
  m.def("backward", &run_backward, py::arg("problem"), py::arg("x"), py::arg("parameters"), py::arg("scale"),
        py::arg("grad_y"), py::arg("recompute"), py::arg("saved"), py::arg("scratch"), py::arg("grad_x"),
        py::arg("gradients"), py::arg("multiprocessors"), py::arg("stream"));
  // Of each stream: CTAs, those that compute all columns, and how many share the others' columns.
  m.def(
      "row_tiles",
      [](const std::array<int, 2>& tiles, const std::array<int, 2>& units, int narrow, int unit, int multiprocessors) {
        std::vector<std::array<int, 3>> streams;
        for (const RowTiles& own : row_tiles({tiles, units, narrow, unit}, multiprocessors))
          streams.push_back({own.ctas, own.whole, own.shares});
        return streams;
      },
      py::arg("tiles"), py::arg("units"), py::arg("narrow"), py::arg("unit"), py::arg("multiprocessors"));
  py::class_<Plan>(m, "Plan")
      .def(py::init([](const Problem& problem, int recompute, int multiprocessors) {
             return Plan{problem, Recompute(recompute), multiprocessors};
           }),
           py::arg("problem"), py::arg("recompute"), py::arg("multiprocessors"))
      .def("forward", &Plan::forward, py::arg("x"), py::arg("parameters"), py::arg("scale"), py::arg("y"),
           py::arg("saved"), py::arg("scratch"), py::arg("stream"))
      .def("backward", &Plan::backward, py::arg("x"), py::arg("parameters"), py::arg("scale"), py::arg("grad_y"),
           py::arg("saved"), py::arg("scratch"), py::arg("gradients"), py::arg("stream"));
  m.def("read_tensors_by", &read_tensors_by, py::arg("capsule"), py::arg("types"), py::arg("dtypes"));
  m.def("present", &present, py::arg("parameters"));
  m.def("set_recorder", [](const py::object& recorder) {
    if (recorder.is_none()) return set_recorder({});
    set_recorder([recorder](const Launch& launch) { recorder(as_dict(launch)); });
  });
  // Counts launches in C++ instead of making them: the time left is the host's, without the driver's part.
  m.def("count_launches", [] {
    static int count;
    count = 0;
    set_recorder([](const Launch&) { ++count; });
    return py::cpp_function([] { return count; });
  });
  m.def("is_recorded", &is_recorded);
  m.def("told_waits", &told_waits);
  m.def("make_current", &make_current);
  m.def("toolkit", &toolkit);
  m.def("packed_ptx", [] {
    py::dict all;
    for (const Embedded& one : embedded())
      all[py::str(one.name.data(), one.name.size())] = py::bytes(one.ptx.data(), one.ptx.size());
    return all;
  });
  m.def("driver", [] {
    const DriverState state = driver_state();
    return py::make_tuple(state.version, state.reason);
  });
}
