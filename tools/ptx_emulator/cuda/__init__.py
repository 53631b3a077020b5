"""Launches of compiled CUDA modules as records: everything that one launch needs, in a value that a file can hold.

`tests/test_ptx_cuda.py` writes them by hand. What stands in for the CUDA driver can fill them as well: the fields are
what `cuLaunchKernelEx` and `cuTensorMapEncodeTiled` are given. `cast_kernels.evidence.cuda_launches` does.
"""

from ptx_emulator.cuda.files import load, save
from ptx_emulator.cuda.record import Given, Pointer, Record, Struct, Tiled, run

__all__ = ["Given", "Pointer", "Record", "Struct", "Tiled", "load", "run", "save"]
