"""The GPU, or its replacement in a rehearsal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cast_kernels.gpu import machine

#: Whether `tests/rehearsal.py` replaces the GPU.
EMULATED = bool(os.environ.get("FIRST_CONTACT_EMULATED"))


@contextmanager
def device() -> Iterator[machine.Machine]:
    """The machine for all work. A rehearsal replaces modules, so import them inside.

    Raises:
        NoGPUError: there is no GPU, and none is emulated.
    """
    if not EMULATED:
        yield machine.CudaMachine()
        return
    from rehearsal import rehearsing

    cache = os.environ.get("REHEARSAL_CACHE")
    with rehearsing(Path(cache) if cache else None):
        yield machine.CudaMachine()
