// Tensors of Python in a call of B-CAST, read without a torch header: by DLPack's table of C functions, which the type of
// tensors carries.
#pragma once
#include <pybind11/pybind11.h>

#include <array>

#include "cuda/bcast.h"

namespace cast::cuda {

// Read tensors from now on by the table in `capsule`, or by their attributes if it is None or of a version that is not
// known here; whether by the table. Only tensors that are exactly of one of `types` are read. dtypes: PyTorch's, in the
// order of `Number`.
bool read_tensors_by(const pybind11::object& capsule, const pybind11::tuple& types, const pybind11::tuple& dtypes);

// Which parameters are there, a bit each in the order of `Parameters`; `parameters` is Python's, tuples in a tuple.
unsigned present(const pybind11::tuple& parameters);

// A call but for its tensors.
struct Plan {
  Problem problem;
  Recompute recompute;
  int multiprocessors;

  // Make the launches, and return true; or make none and return false, because a tensor is not what kernels read:
  // contiguous, of the problem's type, at an address that copies take.
  bool forward(const pybind11::tuple& x, const pybind11::tuple& parameters, const pybind11::tuple& scale,
               const pybind11::tuple& y, pybind11::handle saved, pybind11::handle scratch, Address stream) const;
  // gradients: of x and the parameters in one; `None` is not wanted.
  bool backward(const pybind11::tuple& x, const pybind11::tuple& parameters, const pybind11::tuple& scale,
                const pybind11::tuple& grad_y, pybind11::handle saved, pybind11::handle scratch,
                const pybind11::tuple& gradients, Address stream) const;
};

}  // namespace cast::cuda
