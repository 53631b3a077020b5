"""Self-attention with its adapter at the paper's sizes: our backend beside what a user would run instead, interleaved.

    pytest benchmarks/bench_self_attention.py --benchmark-only

A row's speed-up is taken against `eager` of the same group, and shown only if its output and every gradient are within
twice that eager's error against fp64. Attention is frozen and the adapter trained, as CAST trains its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from compare import Candidate, compare
from measure import bytes_kept_for_backward
from report import recorded_time, replay
from torch import Tensor

import cast_kernels
from cast_kernels import SelfAttentionParameters

DIM, HEADS, ADAPTER = 768, 12, 192
#: [batch, tokens] of one clip in the two experts.
SHAPES = {"temporal": (1, 1568), "spatial": (8, 197)}
BASELINE = "eager"
CALLS: dict[str, Callable[..., Tensor]] = {
    BASELINE: partial(cast_kernels.self_attention, backend="eager"),
    "torch.compile": torch.compile(partial(cast_kernels.self_attention, backend="eager"), dynamic=False),
    "cast_kernels, cpu": partial(cast_kernels.self_attention, backend="cpu"),
    "cast_kernels, cpu, recompute nothing": partial(cast_kernels.self_attention, backend="cpu", recompute="nothing"),
    "cast_kernels, cpu, recompute all": partial(cast_kernels.self_attention, backend="cpu", recompute="all"),
}
SAMPLES = {"forward": 9, "forward+backward": 7}
#: That the samples of one group may take together.
GROUP_SECONDS = 60.0


def flops(expert: str, work: str) -> int:
    """Matrix products of forward, or of forward and the backward that frozen attention and a trained adapter need."""
    batch, tokens = SHAPES[expert]
    forward = 4 * DIM + 2 * tokens + 2 * ADAPTER
    backward = 4 * DIM + 4 * tokens + 4 * ADAPTER
    return 2 * batch * tokens * DIM * (forward + (backward if work == "forward+backward" else 0))


def make_parameters() -> SelfAttentionParameters:
    """Every parameter random, so that nothing multiplies by zero."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.1)

    return SelfAttentionParameters(
        1 + weight(DIM), weight(DIM), weight(3 * DIM, DIM), weight(3 * DIM), weight(DIM, DIM), weight(DIM),
        weight(ADAPTER, DIM), weight(ADAPTER), weight(DIM, ADAPTER), weight(DIM),
    )  # fmt: skip


class Variant:
    """One way to compute the op, forward and with the gradients that CAST trains."""

    def __init__(self, call: Callable[..., Tensor], dtype: torch.dtype, expert: str) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x, self.grad = (torch.randn(*SHAPES[expert], DIM, generator=generator).to(dtype) for _ in range(2))
        self.weights = [p.to(dtype) for p in make_parameters() if p is not None]
        self.trained = self.weights[6:]
        self.call = partial(call, num_heads=HEADS, eps=1e-6)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(self.x, SelfAttentionParameters(*self.weights))

    def training_forward(self) -> Tensor:
        for tensor in (self.x, *self.trained):
            tensor.requires_grad_(True)
        return self.call(self.x, SelfAttentionParameters(*self.weights))

    def forward_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.training_forward(), [self.x, *self.trained], self.grad)

    def results(self, backward: bool) -> dict[str, Tensor]:
        named = {"y": self.forward()}
        if backward:
            named |= {f"grad.{i}": grad for i, grad in enumerate(self.forward_backward())}
        return named

    def kept_mib(self) -> float:
        """MiB that autograd keeps from forward to backward, the input included, parameters not."""
        return bytes_kept_for_backward(self.training_forward, self.weights) / 2**20


def build(name: str, expert: str, backward: bool) -> Candidate:
    """One row's candidate; all rows have the same weights and inputs."""
    variant = Variant(CALLS[name], torch.float32, expert)
    step = variant.forward_backward if backward else variant.forward
    return Candidate(step, partial(variant.results, backward), variant.kept_mib if backward else None)


@cache
def measure_group(expert: str, work: str) -> dict[str, dict[str, Any]]:
    """All rows of one expert and one kind of work, interleaved: name -> row of the table."""
    backward = work == "forward+backward"
    exact = Variant(cast_kernels.reference.self_attention, torch.float64, expert).results(backward)
    builders: dict[str, Callable[[], Candidate]] = {
        name: partial(build, name, expert, backward) for name in rows_of(work)
    }
    return compare(builders, exact, BASELINE, flops(expert, work), SAMPLES[work], GROUP_SECONDS)


def rows_of(work: str) -> list[str]:
    """Forward alone keeps nothing, whatever `recompute` says."""
    return [name for name in CALLS if work != "forward" or "recompute" not in name]


ROWS = [(expert, work, name) for expert in SHAPES for work in SAMPLES for name in rows_of(work)]


@pytest.mark.timeout(1800)
@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("expert", "work", "name"), ROWS)
def test_self_attention(expert: str, work: str, name: str, benchmark: Any, report: Any) -> None:
    """One row of its group's interleaved run."""
    row = measure_group(expert, work)[name]
    batch, tokens = SHAPES[expert]
    report.add(f"self-attention 768, 12 heads, adapter 192, {batch} x {tokens} tokens, fp32, {work}", name, row)
    benchmark.group = f"self_attention {expert} {work}"
    replay(benchmark, row)
    if "missing" in row:
        pytest.skip(row["missing"])
    if name.startswith("cast_kernels"):  # a peer that misses the bound is shown without a speed-up; we must not miss it
        assert row["correct"], f"{name}: error is {row['worst_error_over_eager']:.2f} times eager's"
