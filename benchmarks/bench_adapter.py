"""The adapter alone, which on a GPU is the kernel inside the experts' halves, beside eager and torch.compile.

    pytest benchmarks/bench_adapter.py --benchmark-only --device cuda

A CPU has no separate kernel for it, so there are no rows there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from expert_op import Call, Op
from groups import First, Group, Row, Sizes
from report import recorded_time
from torch import Tensor

import cast_kernels
from cast_kernels import AdapterParameters


def call(expert: str, sizes: Sizes, **options: Any) -> Call:
    return partial(_in_series, partial(cast_kernels.adapter, **options))


def reference(expert: str, sizes: Sizes) -> Call:
    return partial(_in_series, cast_kernels.reference.adapter)


def _in_series(adapter: Any, x: Tensor, parameters: AdapterParameters) -> Tensor:
    """As in self-attention: the input is also the residual."""
    return adapter(x, parameters, residual=x)


def shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    d, a = sizes.dim, sizes.adapter
    return [(a, d), (a,), (d, a), (d,)]


def flops(sizes: Sizes, shape: tuple[int, int], backward: bool) -> int:
    """Two products forward; four more backward."""
    return 4 * shape[0] * shape[1] * sizes.dim * sizes.adapter * (3 if backward else 1)


OP = Op(
    "adapter", AdapterParameters, shapes, call, reference, flops, first={("temporal", "amp", 6, "training"): First(45)},
    experts=("temporal",), devices=("cuda",),
)  # fmt: skip


def groups(device: str, sizes: Sizes) -> list[Group]:
    return OP.groups(device, sizes)


@pytest.mark.timeout(1800)
@pytest.mark.benchmark(timer=recorded_time)
def test_adapter(row: Row, measure: Callable[[Row], None]) -> None:
    """One row of its group's interleaved run."""
    measure(row)
