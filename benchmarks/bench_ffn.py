"""The FFN and its adapter at the paper's size: our backends beside the alternatives, interleaved.

    pytest benchmarks/bench_ffn.py --benchmark-only

A row's speed-up is relative to `eager` of the same group. It is shown only if the output and each gradient have at most
twice that eager's error against fp64. The FFN is frozen and the adapter trained, as in CAST.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from expert_op import Call, Op
from groups import First, Group, Row, Sizes
from report import recorded_time

import cast_kernels
from cast_kernels import FFNParameters

#: Expert -> its activation.
ACTIVATION = {"temporal": "gelu", "spatial": "quick_gelu"}


def call(expert: str, sizes: Sizes, **options: Any) -> Call:
    return partial(cast_kernels.ffn, activation=ACTIVATION[expert], eps=1e-6, **options)


def reference(expert: str, sizes: Sizes) -> Call:
    return partial(cast_kernels.reference.ffn, activation=ACTIVATION[expert], eps=1e-6)


def shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    d, f, a = sizes.dim, sizes.hidden, sizes.adapter
    return [(d,), (d,), (f, d), (f,), (d, f), (d,), (a, d), (a,), (d, a), (d,)]


def flops(sizes: Sizes, shape: tuple[int, int], backward: bool) -> int:
    """Operations of the matrix products. Backward adds twice the adapter's and once the frozen FFN's."""
    rows = shape[0] * shape[1]
    forward = 4 * rows * sizes.dim * (sizes.hidden + sizes.adapter)
    return 2 * forward + 4 * rows * sizes.dim * sizes.adapter if backward else forward


OP = Op(
    "ffn", FFNParameters, shapes, call, reference, flops,
    first={("temporal", "amp", 6, "training"): First(35, levels=("cheap",))},
)  # fmt: skip


def groups(device: str, sizes: Sizes) -> list[Group]:
    return OP.groups(device, sizes)


@pytest.mark.timeout(1800)
@pytest.mark.benchmark(timer=recorded_time)
def test_ffn(row: Row, measure: Callable[[Row], None]) -> None:
    """One row of its group's interleaved run."""
    measure(row)
