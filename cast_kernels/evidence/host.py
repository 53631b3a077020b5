"""What the host needs for a step: a number of operators and launches, each at a cost that was measured or is stated.

`measure` runs a model of next to no size in float32, so that what is timed is dispatch, autograd and Python. Triton's
launches are recorded in the driver's place. What a GPU's host needs is like this within a factor of two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cast_kernels.evidence.devices import Constant
from cast_kernels.evidence.driver import Recorder, offline_driver
from cast_kernels.evidence.eager_model import Ledger
from cast_kernels.evidence.parts import Model, parts
from cast_kernels.evidence.targets import target

_HERE = "on two shared x86-64 cores, 2026-11-29: `python -m cast_kernels.evidence.host`"
OPERATOR = Constant(3.0, "us an operator, autograd included", f"measured on tensors of one number {_HERE}")
TRITON = Constant(175.0, "us a launch of ours, Python around it included", f"measured with launches recorded {_HERE}")
LAUNCH = Constant(2.0, "us a kernel", "cudaLaunchKernel by itself", assumed=True)
COMPILED = Constant(5.0, "us a kernel", "inductor's wrapper without CUDA graphs, launch included", assumed=True)
GRAPH = Constant(100.0, "us a step", "one replay of a CUDA graph", assumed=True)

#: A model of which every part is there and nothing takes time.
TINY = Model(
    batch=1, depth=2, frames=2, grid=2, patch=8, dim=64, heads=2, hidden=64, adapter=16, bottleneck=32, verbs=2, nouns=2
)


def interpreted_us(operators: int, launches: int) -> float:
    """Host time where Python calls each operator, `launches` of ours among the kernels."""
    return operators * (OPERATOR + LAUNCH) + launches * (TRITON + LAUNCH)


class Measured(NamedTuple):
    """Microseconds for each."""

    operator: float
    triton: float


def measure(cache: Path | None = None, repeats: int = 30) -> Measured:
    """Time operators on one number, then the small model's training step: medians.

    Args:
        cache: folder of compiled kernels, None for a temporary one.
        repeats: behind three that warm up.
    """
    ledger = Ledger()
    with ledger:
        _operators()
    operator = _median(_operators, repeats) / len(ledger.operations)
    with offline_driver(target("sm_90"), Recorder(), cache) as recorder:
        made, ledger = parts(TINY, "triton"), Ledger()

        def step() -> None:
            for part in made:
                part.backward(part.forward())

        with ledger:
            step()
        launches = sum(record.launches for record in recorder.records.values())
        ours = _median(step, repeats)
    return Measured(operator, (ours - len(ledger.operations) * operator) / launches)


def _operators() -> None:
    """Forward and backward of operators as a transformer has them, each on one number."""
    x, weight, bias = (torch.ones(shape, requires_grad=True) for shape in ((1, 1), (1, 1), (1,)))
    y = x
    for _ in range(10):
        y = F.layer_norm(y, (1,), bias, bias)
        y = F.gelu(F.linear(y, weight, bias))
        y = (y + x) * x
    torch.autograd.grad(y, (x, weight, bias))


def _median(function: Callable[[], object], repeats: int) -> float:
    return median([_timed(function) for _ in range(repeats + 3)][3:])


def _timed(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return 1e6 * (time.perf_counter() - begin)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(measure())
