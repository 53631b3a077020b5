// A Python module without contents. It makes the file with the vector machine's C functions a module, because Python's
// tools import every library of a package. tools/ptx_emulator/native/library.py calls the functions.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_machine, m) { m.doc() = "The vector machine of the PTX emulator; see csrc/ptx."; }
