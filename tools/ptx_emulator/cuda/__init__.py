"""Launches of compiled CUDA modules as records: everything that one launch needs, in a value that a file can hold.

`tests/test_ptx_cuda.py` writes them by hand; a program that stands in for the CUDA driver fills them as well. The
fields are what `cuLaunchKernelEx` and `cuTensorMapEncodeTiled` are given.
"""

from ptx_emulator.cuda.files import load, save
from ptx_emulator.cuda.record import Given, Pointer, Record, Struct, Tiled, run

__all__ = ["Given", "Pointer", "Record", "Struct", "Tiled", "load", "run", "save"]
