"""The host's time for a step: numbers of operators and launches, each with a measured or stated cost.

`measure` times PyTorch's operators on tensors of one number, so that the time is dispatch and autograd. The benchmarks'
group `host` measures our launches. The host of a GPU differs by at most a factor of two, by assumption.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from ptx_emulator.predict.devices import Constant

from cast_kernels.evidence.eager_model import Ledger

_HERE = "on two shared x86-64 cores, 2026-11-29: `python -m cast_kernels.evidence.host`"
OPERATOR = Constant(3.0, "us an operator, autograd included", f"measured on tensors of one number {_HERE}")
#: From a training step of CAST-B under AMP on an idle machine: 26.8 ms, less 411 operators, over 658 launches.
TRITON = Constant(
    39.0, "us a launch of ours, Python around it included",
    "measured with launches counted instead of made on two shared x86-64 cores, 2026-11-29: "
    "`pytest benchmarks/ --benchmark-only -k host`",
)  # fmt: skip
LAUNCH = Constant(2.0, "us a kernel", "cudaLaunchKernel by itself", assumed=True)
COMPILED = Constant(5.0, "us a kernel", "inductor's wrapper without CUDA graphs, launch included", assumed=True)
GRAPH = Constant(100.0, "us a step", "one replay of a CUDA graph", assumed=True)


def interpreted_us(operators: int, launches: int) -> float:
    """Host time if Python calls each operator; `launches` of the kernels are ours."""
    return operators * (OPERATOR + LAUNCH) + launches * (TRITON + LAUNCH)


def measure(repeats: int = 30) -> float:
    """Microseconds of an operator: the median over `repeats` runs of all of them, after three warm-up runs."""
    ledger = Ledger()
    with ledger:
        _operators()
    return _median(_operators, repeats) / len(ledger.operations)


def _operators() -> None:
    """Forward and backward of a transformer's operators, each on one number."""
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
