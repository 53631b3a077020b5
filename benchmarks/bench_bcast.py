"""B-CAST at the paper's size: our backends beside everything a user would run instead, in one interleaved run.

    pytest benchmarks/ --benchmark-only -k bcast

A row's speed-up is taken against `eager, published code` of the same group and dtype, and shown only if every output
and gradient of the row is within twice that eager's error against fp64. bf16 is autocast for every row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from baselines import OneDNNLinears, from_published_layout, published, to_published_layout
from compare import Candidate, compare
from measure import bytes_kept_for_backward
from models import randomise
from report import recorded_time, replay
from torch import Tensor

import cast_kernels
from cast_kernels.ops.bcast import flops

BASELINE = "eager, published code"
TUNED = "eager, tuned (SDPA)"
ONEDNN = "eager, tuned + oneDNN linears"  # forward only, as the operator has no gradient
#: Our rows: name -> arguments of BCAST. Forward alone repeats nothing, so it has the first of them only.
OURS: dict[str, dict[str, Any]] = {
    "cast_kernels, cpu": {"backend": "cpu"},
    "cast_kernels, cpu, recompute=nothing": {"backend": "cpu", "recompute": "nothing"},
    "cast_kernels, cpu, recompute=all": {"backend": "cpu", "recompute": "all"},
}
NAMES = [BASELINE, TUNED, ONEDNN, "torch.compile, published code", "torch.compile, tuned (SDPA)", *OURS]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES = [1, 2, 6]
#: Work -> samples of each row, at most.
SAMPLES = {"forward": 15, "forward+backward": 9}
#: Seconds for all samples of a group; slow groups have fewer samples.
GROUP_SECONDS = 10.0

Streams = tuple[Tensor, Tensor]


def make_module(**arguments: Any) -> cast_kernels.BCAST:
    """The default B-CAST with every parameter random, so that nothing multiplies by zero."""
    return randomise(cast_kernels.BCAST(**arguments))


class Variant:
    """One way to compute the exchange, in the layout that is native to it."""

    def __init__(
        self,
        module: cast_kernels.BCAST,
        call: Callable[..., Streams],
        streams: Streams,
        token_first: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module, self.token_first, self.dtype = module, token_first, dtype
        self.function = call
        self.native = to_published_layout(*streams) if token_first else streams
        generator = torch.Generator().manual_seed(7)
        grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in streams]
        self.grads = to_published_layout(*grads) if token_first else tuple(grads)

    def call(self, *streams: Tensor) -> Streams:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.function(*streams)

    def inputs(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in self.native]

    def forward(self) -> Streams:
        with torch.no_grad():
            return self.call(*self.native)

    def forward_backward(self) -> list[Tensor]:
        inputs = self.inputs()
        outputs = self.call(*inputs)
        return list(torch.autograd.grad(outputs, [*inputs, *self.module.parameters()], self.grads))

    def results(self, backward: bool) -> dict[str, Tensor]:
        frames = self.module.num_frames

        def ordered(streams: Any) -> Streams:
            return from_published_layout(*streams, frames) if self.token_first else streams

        named = dict(zip(("spatial", "temporal"), ordered(self.forward()), strict=True))
        if backward:
            grads = self.forward_backward()
            named |= zip(("grad.spatial", "grad.temporal"), ordered(grads[:2]), strict=True)
            named |= zip((f"grad.{n}" for n, _ in self.module.named_parameters()), grads[2:], strict=True)
        return named

    def kept_mib(self) -> float:
        """MiB that autograd keeps from forward to backward, inputs included, parameters not."""
        return bytes_kept_for_backward(lambda: self.call(*self.inputs()), list(self.module.parameters())) / 2**20

    def candidate(self, backward: bool) -> Candidate:
        step = self.forward_backward if backward else self.forward
        return Candidate(step, partial(self.results, backward), self.kept_mib if backward else None)


def make_streams(batch: int) -> Streams:
    generator = torch.Generator().manual_seed(batch)
    return tuple(torch.randn(batch, 8, n, 768, generator=generator) for n in (197, 196))  # type: ignore[return-value]


@lru_cache(1)
def exact_results(batch: int) -> dict[str, Tensor]:
    """Outputs and gradients in fp64, by the reference."""
    wide = make_module(backend="eager").double()
    spatial, temporal = (x.double() for x in make_streams(batch))
    return Variant(wide, partial(_reference, wide), (spatial, temporal)).results(backward=True)


def _reference(module: cast_kernels.BCAST, spatial: Tensor, temporal: Tensor) -> Streams:
    return cast_kernels.reference.bcast(spatial, temporal, module.gathered(), num_heads=module.num_heads)


def run_eager(module: cast_kernels.BCAST, spatial: Tensor, temporal: Tensor) -> Streams:
    return cast_kernels.bcast(spatial, temporal, module.gathered(), num_heads=module.num_heads, backend="eager")


def run_onednn(module: cast_kernels.BCAST, spatial: Tensor, temporal: Tensor) -> Streams:
    with OneDNNLinears():
        return run_eager(module, spatial, temporal)


def build(name: str, batch: int, dtype: torch.dtype, backward: bool) -> Candidate:
    """One row's candidate; all rows have the same weights and inputs."""
    module = make_module(**OURS.get(name, {}))
    plain = {TUNED: run_eager, ONEDNN: run_onednn}.get(name, published if "published" in name else run_eager)
    call: Any = module if name in OURS else partial(plain, module)
    if name.startswith("torch.compile"):
        call = torch.compile(call, dynamic=False)
    return Variant(module, call, make_streams(batch), "published" in name, dtype).candidate(backward)


@lru_cache(1)
def measure_group(dtype: str, batch: int, work: str) -> dict[str, dict[str, Any]]:
    """All rows of one dtype, batch size and kind of work, interleaved: name -> row of the table."""
    backward = work == "forward+backward"
    torch._dynamo.reset()
    exact = exact_results(batch)
    if not backward:
        exact = {name: exact[name] for name in ("spatial", "temporal")}
    names = [name for name in NAMES if has_row(name, dtype, work)]
    builders = {name: partial(build, name, batch, DTYPES[dtype], backward) for name in names}
    work_flops = flops(make_module().problem(batch)) * (3 if backward else 1)
    return compare(builders, exact, BASELINE, work_flops, SAMPLES[work], GROUP_SECONDS)


def has_row(name: str, dtype: str, work: str) -> bool:
    if name == ONEDNN:
        return (dtype, work) == ("fp32", "forward")
    return work != "forward" or "recompute" not in OURS.get(name, {})


ROWS = [
    (dtype, batch, work, name)
    for batch in BATCHES
    for dtype in DTYPES
    for work in SAMPLES
    for name in NAMES
    if has_row(name, dtype, work)
]


@pytest.mark.timeout(3600)
@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("dtype", "batch", "work", "name"), ROWS)
def test_bcast(dtype: str, batch: int, work: str, name: str, benchmark: Any, report: Any) -> None:
    """One row of its group's interleaved run."""
    row = measure_group(dtype, batch, work)[name]
    report.add(f"bcast {dtype} B={batch} {work}: 768/384, 12 heads, 8 x 196 tokens", name, row)
    benchmark.group = f"bcast {dtype} B={batch} {work}"
    replay(benchmark, row)
    if "missing" in row:
        pytest.skip(row["missing"])
    if name in OURS:  # a peer that misses the bound is shown without a speed-up; we must not miss it
        assert row["correct"], f"{name}: error is {row['worst_error_over_eager']:.2f} times eager's"
