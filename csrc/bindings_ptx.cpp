// A Python module without contents, so that the file that holds the vector machine's C functions is one: Python's tools
// import what lies in a package. tools/ptx_emulator/native/library.py calls the functions.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_machine, m) { m.doc() = "The vector machine of the PTX emulator; see csrc/ptx."; }
