"""Self-attention and its adapter at the paper's sizes: our backends beside the alternatives, interleaved.

    pytest benchmarks/bench_self_attention.py --benchmark-only

A row's speed-up is relative to `eager` of the same group. It is shown only if the output and each gradient have at most
twice that eager's error against fp64. Attention is frozen and the adapter trained, as in CAST.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from expert_op import BASELINE, Call, Op
from groups import First, Group, Row, Sizes
from report import recorded_time
from torch import Tensor
from variants import PACKAGES, attending, attentions, package_attention

import cast_kernels
from cast_kernels import SelfAttentionParameters

#: PyTorch's kernels in tier `first`.
KERNELS = ("flash", "efficient", "cudnn")


def call(expert: str, sizes: Sizes, **options: Any) -> Call:
    return partial(cast_kernels.self_attention, num_heads=sizes.heads, eps=1e-6, **options)


def reference(expert: str, sizes: Sizes) -> Call:
    return partial(cast_kernels.reference.self_attention, num_heads=sizes.heads, eps=1e-6)


def peer(expert: str, sizes: Sizes, name: str) -> Call:
    """Eager with one attention kernel: a library's by our option for it, PyTorch's by name."""
    attention = name.removeprefix(f"{BASELINE} by ")
    if attention in PACKAGES:
        package_attention(attention)
        return call(expert, sizes, backend="eager", attention=attention)
    eager, context = call(expert, sizes, backend="eager"), attending(attention)

    def run(x: Tensor, parameters: Any) -> Tensor:
        with context():
            return eager(x, parameters)

    return run


def peer_names(device: str, compute: torch.dtype) -> tuple[str, ...]:
    return tuple(f"{BASELINE} by {name}" for name in attentions(device, compute))


def shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    d, a = sizes.dim, sizes.adapter
    return [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (a, d), (a,), (d, a), (d,)]


def flops(sizes: Sizes, shape: tuple[int, int], backward: bool) -> int:
    """Operations of forward's matrix products, plus those of a backward with frozen attention and a trained adapter."""
    batch, tokens = shape
    forward = 4 * sizes.dim + 2 * tokens + 2 * sizes.adapter
    more = 4 * sizes.dim + 4 * tokens + 4 * sizes.adapter if backward else 0
    return 2 * batch * tokens * sizes.dim * (forward + more)


OP = Op(
    "self_attention", SelfAttentionParameters, shapes, call, reference, flops,
    first={
        ("temporal", "amp", 6, "training"): First(40, (*KERNELS, *PACKAGES)),
        ("spatial", "amp", 6, "training"): First(60),
    },
    peers=peer, peer_names=peer_names,
)  # fmt: skip


def groups(device: str, sizes: Sizes) -> list[Group]:
    return OP.groups(device, sizes)


@pytest.mark.timeout(1800)
@pytest.mark.benchmark(timer=recorded_time)
def test_self_attention(row: Row, measure: Callable[[Row], None]) -> None:
    """One row of its group's interleaved run."""
    measure(row)
