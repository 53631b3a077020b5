"""Where the tests keep the kernels that they compile for the emulator: Triton's own folder, as `checking` has it.

A kernel is compiled once for all tests, processes and sessions of a machine. Triton's key is a hash of the kernel's
source, its constants, the options, the target and Triton itself, so a change of any of them compiles anew.
"""

from contextlib import AbstractContextManager
from pathlib import Path

import triton
from ptx_emulator.targets import Target
from ptx_emulator.triton.driver import AnyLauncher, offline_driver

KERNELS = Path(triton.knobs.cache.dir)


def offline(goal: Target, launcher: AnyLauncher) -> AbstractContextManager[AnyLauncher]:
    """`offline_driver` with these kernels."""
    return offline_driver(goal, launcher, KERNELS)
