"""A pause of Python's collector of cycles, while many objects are made that will live."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Make objects without looking for garbage among all those of the process: beside torch, half of the time went
    there that a kernel of 14,000 instructions takes to be decoded."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
