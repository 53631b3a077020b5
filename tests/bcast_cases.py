"""Problems for the tests of B-CAST, and the measure of correctness that all of them use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import cast_kernels
from cast_kernels.evidence import cases
from cast_kernels.evidence.cases import Case, compare

#: Small and awkward: no size divides another.
AWKWARD = Case(batch=2, frames=3, patches=7, dim=40, bottleneck=24, heads=3, recompute="auto")


def small(**changes: Any) -> Case:
    """:data:`AWKWARD` with other values in some fields."""
    return replace(AWKWARD, **changes)


WINDOWS = [(a, b) for a in cast_kernels.WINDOWS for b in cast_kernels.WINDOWS]
CASES = [
    *(small(windows=windows, seed=i) for i, windows in enumerate(WINDOWS)),
    small(directions=("t2s",), windows=("time", "space"), seed=20),
    small(directions=("s2t",), windows=("time", "space"), seed=21),
    small(directions=("t2s",), windows=("space-time", "time"), scaled=True, seed=22),
    small(positions=False, seed=23),
    small(scaled=True, seed=24),
    small(windows=("space-time", "space"), positions=False, scaled=True, seed=25),
    small(batch=1, frames=8, patches=49, dim=96, bottleneck=48, heads=4, seed=26),
    small(batch=3, frames=5, patches=1, dim=16, bottleneck=16, heads=16, seed=27),
    small(batch=1, frames=1, patches=19, dim=33, bottleneck=35, heads=5, seed=28),
    small(batch=1, frames=8, patches=196, dim=64, bottleneck=64, heads=2, seed=29),
]
PAPER = small(batch=1, frames=8, patches=196, dim=768, bottleneck=384, heads=12, seed=30)


@contextmanager
def cpu_rules(dtype: torch.dtype | None, device: str) -> Iterator[None]:
    """Autocast as it is on a CPU: what a user without a GPU gets."""
    with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def run(case: Case, dtype: torch.dtype, backend: str | None, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and every gradient of one call in `dtype`, in float64. `backend=None` is the reference."""
    return cases.run(case, backend, dtype, autocast=autocast, rules=cpu_rules)


def assert_at_most_twice_eager(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Every tensor's error against fp64 is at most twice eager's in the same dtype.

    The error is the root mean square over the tensor: the largest single error of a 24-element gradient differs
    by more than a factor of two between two equally good summation orders (seen between two eager formulations).
    A single wrong element cannot hide: the largest error may be at most four times eager's. Below half a unit in
    the last place of the tensor's own size no arithmetic can be asked for more, so that is the floor.
    """
    errors = compare(ours, eager, exact)
    rows = [
        f"{'ok  ' if e.ok else 'FAIL'} {e.name:<32} rms {e.rms:.2e} (eager {e.eager_rms:.2e})  "
        f"max {e.worst:.2e} (eager {e.eager_worst:.2e})  floor {e.floor:.1e}"
        for e in errors
    ]
    assert all(e.ok for e in errors), "\n" + "\n".join(rows)
