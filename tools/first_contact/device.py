"""The GPU, or what stands in for it in a rehearsal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cast_kernels.gpu.machine import CudaMachine, Machine

#: Whether no GPU is there, and an emulated one takes its place.
EMULATED = bool(os.environ.get("FIRST_CONTACT_EMULATED"))


@contextmanager
def device() -> Iterator[Machine]:
    """The machine that everything runs on.

    Raises:
        NoGPUError: there is none, and none is emulated.
    """
    if not EMULATED:
        yield CudaMachine()
        return
    raise NotImplementedError
