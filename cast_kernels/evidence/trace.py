"""Counters of a recorded launch without running it: :mod:`ptx_emulator.predict.trace` on its compiled PTX."""

from __future__ import annotations

from functools import lru_cache

import ptx_emulator
from ptx_emulator.predict.counters import Counters
from ptx_emulator.predict.trace import SAMPLES, whole
from ptx_emulator.predict.trace import ctas as traced_ctas
from ptx_emulator.triton.driver import Launch


def trace(launch: Launch, samples: int = SAMPLES) -> Counters:
    """Counters of the launch, from a sample of its CTAs.

    Raises:
        NotImplementedError: the number of a loop's iterations depends on data.
    """
    return whole(ctas(launch, samples), launch.grid)


def ctas(launch: Launch, samples: int = SAMPLES) -> list[Counters]:
    """Counters of single CTAs, sampled evenly over the grid, in its order.

    Raises:
        NotImplementedError: the number of a loop's iterations depends on data.
    """
    values = [argument.value if isinstance(argument.value, int) else None for argument in launch.arguments]
    return traced_ctas(kernel_of(launch), launch.grid, launch.threads, values, samples)


def length(launch: Launch) -> int:
    """Number of instructions in the launch's PTX."""
    return len(kernel_of(launch).instructions)


def kernel_of(launch: Launch) -> ptx_emulator.Kernel:
    """The launch's kernel, parsed once."""
    return _parsed(launch.asm["ptx"], launch.kernel)


@lru_cache(maxsize=256)
def _parsed(ptx: str, kernel: str) -> ptx_emulator.Kernel:
    return ptx_emulator.parse(ptx).kernels[kernel]
