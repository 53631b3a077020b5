"""The GPU, or what stands in for it in a rehearsal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cast_kernels.gpu import machine

#: Whether no GPU is there, and `tests/rehearsal.py` takes its place.
EMULATED = bool(os.environ.get("FIRST_CONTACT_EMULATED"))


@contextmanager
def device() -> Iterator[machine.Machine]:
    """The machine that everything runs on. What it replaces in a rehearsal must be imported inside.

    Raises:
        NoGPUError: there is none, and none is emulated.
    """
    if not EMULATED:
        yield machine.CudaMachine()
        return
    from rehearsal import rehearsing

    cache = os.environ.get("REHEARSAL_CACHE")
    with rehearsing(Path(cache) if cache else None):
        yield machine.CudaMachine()
