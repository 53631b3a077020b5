#include "bindings_cuda_tensors.h"

namespace py = pybind11;

namespace cast::cuda {
namespace {

constexpr Address ALIGNMENT = 16;  // of what copies take

// ---- DLPack's layout, version 1: https://dmlc.github.io/dlpack/latest/c_api.html ----

struct DLTensor {
  void* data;
  std::int32_t device_type, device_number;
  std::int32_t dimensions;
  std::uint8_t kind, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
constexpr unsigned FLOAT = 2, BFLOAT = 4;

struct ExchangeTable {
  std::uint32_t major, minor;
  ExchangeTable* older;
  void *allocate, *from_object, *to_object;
  int (*view)(void* object, DLTensor* out);  // 0, or a Python exception is set
  void* current_stream;
};

// How tensors are read; leaked, as Python is gone when statics end.
struct Reading {
  ExchangeTable* table = nullptr;
  py::tuple types{}, dtypes{};  // the tensors' types, two; dtypes in the order of `Number`
};
Reading& reading() {
  static auto& one = *new Reading;
  return one;
}

struct Seen {
  Address address;
  bool fits;  // contiguous, of the type that was asked for
};

bool is_contiguous(const DLTensor& x) {
  std::int64_t step = 1;
  for (int i = x.dimensions - 1; i >= 0; --i) {
    if (x.shape[i] != 1 && x.strides[i] != step) return false;
    step *= x.shape[i];
  }
  return true;
}

Seen see_by_table(py::handle x, Number type) {
  DLTensor seen{};
  if (reading().table->view(x.ptr(), &seen) != 0) throw py::error_already_set();
  const unsigned kind = type == Number::bf16 ? BFLOAT : FLOAT;
  const bool is_of = seen.kind == kind && seen.bits == 8 * bytes_of(type) && seen.lanes == 1;
  return {reinterpret_cast<Address>(seen.data) + seen.byte_offset, is_of && is_contiguous(seen)};
}

// Where PyTorch has no table.
Seen see_by_attributes(py::handle x, Number type) {
  const py::object dtype = reading().dtypes[static_cast<std::size_t>(type)];
  const bool is_of = py::object(x.attr("dtype")).is(dtype);
  return {x.attr("data_ptr")().cast<Address>(), is_of && x.attr("is_contiguous")().cast<bool>()};
}

// Fills in addresses while tensors are what kernels read.
class Reader {
 public:
  bool good() const { return good_; }

  // 0 for None.
  Address read(py::handle x, Number type) {
    if (x.is_none()) return 0;
    const Seen seen = see(x, type);
    good_ = good_ && seen.fits && seen.address % ALIGNMENT == 0;
    return seen.address;
  }
  std::array<Address, 2> read_pair(const py::tuple& pair, Number type) {
    return {read(PyTuple_GET_ITEM(pair.ptr(), 0), type), read(PyTuple_GET_ITEM(pair.ptr(), 1), type)};
  }
  // Of memory that was made for this call.
  Address address(py::handle memory) { return see(memory, Number::fp32).address; }

 private:
  Seen see(py::handle x, Number type) {
    const auto* own = reinterpret_cast<PyObject*>(Py_TYPE(x.ptr()));
    good_ = good_ && (own == types_[0] || own == types_[1]);
    if (!good_) return {};
    return by_table_ ? see_by_table(x, type) : see_by_attributes(x, type);
  }
  const PyObject* types_[2] = {PyTuple_GET_ITEM(reading().types.ptr(), 0), PyTuple_GET_ITEM(reading().types.ptr(), 1)};
  const bool by_table_ = reading().table != nullptr;
  bool good_ = true;
};

// The parameters as Python holds them: owners, and in each its tensors.
constexpr int OWNERS = 4, FIELDS[OWNERS] = {6, 6, 8, 8};

template <class Function>
void for_each(const py::tuple& parameters, Function function) {
  int at = 0;
  for (int owner = 0; owner < OWNERS; ++owner) {
    PyObject* tensors = PyTuple_GET_ITEM(parameters.ptr(), owner);
    if (tensors != Py_None && (!PyTuple_Check(tensors) || PyTuple_GET_SIZE(tensors) != FIELDS[owner]))
      throw py::type_error("parameters are tuples of 6, 6, 8 and 8 tensors");
    for (int field = 0; field < FIELDS[owner]; ++field)
      function(at++, py::handle(tensors == Py_None ? Py_None : PyTuple_GET_ITEM(tensors, field)));
  }
}

void check_sizes(const py::tuple& parameters, std::initializer_list<py::handle> pairs) {
  bool fits = parameters.size() == OWNERS;
  for (const py::handle pair : pairs) fits = fits && PyTuple_GET_SIZE(pair.ptr()) == 2;
  if (!fits) throw py::value_error("a call has two streams, and parameters of four owners");
}

Parameters read_parameters(Reader& reader, const py::tuple& parameters, Number type) {
  Parameters found{};
  auto* to = reinterpret_cast<Address*>(&found);
  for_each(parameters, [&](int at, py::handle x) { to[at] = reader.read(x, type); });
  return found;
}

// The recorder is Python's; the driver needs no Python.
template <class Function>
void without_python(Function function) {
  if (is_recorded()) return function();
  const py::gil_scoped_release release;
  function();
}

}  // namespace

bool read_tensors_by(const py::object& capsule, const py::tuple& types, const py::tuple& dtypes) {
  auto* found = capsule.is_none() ? nullptr : py::reinterpret_borrow<py::capsule>(capsule).get_pointer<ExchangeTable>();
  if (found != nullptr && found->major != 1) found = nullptr;
  if (types.size() != 2 || dtypes.size() != 3) throw py::value_error("two types and three dtypes");
  reading() = {found, types, dtypes};
  return found != nullptr;
}

unsigned present(const py::tuple& parameters) {
  unsigned bits = 0;
  check_sizes(parameters, {});
  for_each(parameters, [&](int at, py::handle x) { bits |= unsigned(!x.is_none()) << at; });
  return bits;
}

bool Plan::forward(const py::tuple& x, const py::tuple& parameters, const py::tuple& scale, const py::tuple& y,
                   py::handle saved, py::handle scratch, Address stream) const {
  check_sizes(parameters, {x, scale, y});
  Reader reader;
  const ForwardCall call{problem,
                         read_parameters(reader, parameters, problem.parameters),
                         reader.read_pair(x, problem.streams),
                         reader.read_pair(y, problem.streams),
                         reader.read_pair(scale, Number::fp32),
                         recompute,
                         reader.address(saved),
                         reader.address(scratch),
                         multiprocessors,
                         stream};
  if (reader.good()) without_python([&] { cuda::forward(call); });
  return reader.good();
}

bool Plan::backward(const py::tuple& x, const py::tuple& parameters, const py::tuple& scale, const py::tuple& grad_y,
                    py::handle saved, py::handle scratch, const py::tuple& gradients, Address stream) const {
  check_sizes(parameters, {x, scale, grad_y});
  constexpr std::size_t INPUTS = 2, ALL = INPUTS + sizeof(Parameters) / sizeof(Address);
  if (gradients.size() != ALL) throw py::value_error("a gradient, or None, for each stream and parameter");
  Reader reader;
  BackwardCall call{problem,
                    read_parameters(reader, parameters, problem.parameters),
                    reader.read_pair(x, problem.streams),
                    reader.read_pair(scale, Number::fp32),
                    reader.read_pair(grad_y, problem.streams),
                    recompute,
                    reader.read(saved, Number::fp32),
                    reader.address(scratch),
                    {},
                    {},
                    multiprocessors,
                    stream};
  auto* to = reinterpret_cast<Address*>(&call.gradients);
  for (std::size_t i = 0; i < ALL; ++i) {
    const bool of_x = i < INPUTS;
    (of_x ? call.grad_x[i] : to[i - INPUTS]) =
        reader.read(PyTuple_GET_ITEM(gradients.ptr(), i), of_x ? problem.streams : problem.parameters);
  }
  if (reader.good()) without_python([&] { cuda::backward(call); });
  return reader.good();
}

}  // namespace cast::cuda
