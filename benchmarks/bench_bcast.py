"""B-CAST at the paper's size: our backends beside the alternatives, in one interleaved run.

    pytest benchmarks/ --benchmark-only -k bcast

A row's speed-up is relative to `eager, published code` of the same group. It is shown only if each output and gradient
has at most twice that eager's error against fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from baselines import OneDNNLinears, from_published_layout, published, to_published_layout
from groups import GPU_BATCHES, KINDS, Candidate, First, Group, Kind, Row, Sizes, Work
from measure import bytes_kept_for_backward, tensor_bytes
from models import randomise
from prediction import predicted
from report import recorded_time
from torch import Tensor
from variants import PACKAGES, attending, attentions, compiled, is_second, options_of, ours

import cast_kernels
from cast_kernels.gpu.machine import Machine
from cast_kernels.ops.bcast import flops

BASELINE = "eager, published code"
TUNED = "eager, tuned (SDPA)"
ONEDNN = "eager, tuned + oneDNN linears"  # forward only, because the operator has no gradient
COMPILED = ("torch.compile, published code", "torch.compile, tuned (SDPA)")

#: Device -> (kind, clips) of its groups.
PROBLEMS = {
    "cpu": [(kind, batch) for batch in (1, 2, 6) for kind in ("fp32", "amp")],
    "cuda": [(kind, batch) for batch in GPU_BATCHES for kind in KINDS],
}
WORKS = ("inference", "training")  # forward; forward and backward
#: Groups of tier `first`.
FIRST = {
    ("amp", 6, "training"): First(30, ("flash",), ("cheap",)),
    ("bf16", 6, "inference"): First(32, peers=False),
    ("bf16", 6, "training"): First(50, tuple(PACKAGES)),
    ("amp", 1, "inference"): First(55),
}

Streams = tuple[Tensor, Tensor]


def groups(device: str, sizes: Sizes) -> list[Group]:
    """Every group of a device."""
    found = []
    for kind, batch in PROBLEMS[device]:
        for work in WORKS:
            rows = row_names(device, KINDS[kind], work)
            name = f"bcast {kind} B{batch} {work}"
            title = (
                f"{name}: {sizes.dim}/{sizes.bottleneck}, {sizes.heads} heads, {sizes.frames} x {sizes.patches} tokens"
            )
            make = partial(make_work, device, sizes, KINDS[kind], batch, work, rows)
            first = FIRST.get((kind, batch, work))
            found.append(Group(name, title, rows, make, first, without=(COMPILED[0], ONEDNN, *filter(is_second, rows))))
    return found


def row_names(device: str, kind: Kind, work: str) -> tuple[str, ...]:
    eager = [BASELINE, TUNED, *(f"{TUNED} by {name}" for name in attentions(device, kind.compute))]
    if (device, kind.name, work) == ("cpu", "fp32", "inference"):
        eager.append(ONEDNN)
    return (*eager, *COMPILED, *ours(device, work == "training", kind.compute))


def make_module(sizes: Sizes, **arguments: Any) -> cast_kernels.BCAST:
    """A B-CAST with only random parameters, so that nothing is multiplied by zero."""
    module = cast_kernels.BCAST(
        sizes.dim, sizes.bottleneck, sizes.heads, sizes.frames, sizes.patches, **arguments
    )  # fmt: skip
    return randomise(module)


class Variant:
    """One way to compute the exchange, on inputs in the layout that it expects: batch first, or token first."""

    def __init__(
        self, module: cast_kernels.BCAST, call: Callable[..., Streams], streams: Streams, kind: Kind,
        token_first: bool = False,
    ) -> None:  # fmt: skip
        self.module, self.token_first, self.kind = module, token_first, kind
        self.function = call
        self.native = to_published_layout(*streams) if token_first else streams
        generator = torch.Generator().manual_seed(7)
        grads = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in streams]
        self.grads = to_published_layout(*grads) if token_first else tuple(grads)

    def call(self, *streams: Tensor) -> Streams:
        with self.kind.context(streams[0].device):
            return self.function(*streams)

    def inputs(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in self.native]

    def forward(self) -> Streams:
        with torch.no_grad():
            return self.call(*self.native)

    def forward_backward(self) -> list[Tensor]:
        inputs = self.inputs()
        outputs = self.call(*inputs)
        grads = [
            g.to(x.dtype) for g, x in zip(self.grads, outputs, strict=True)
        ]  # under AMP the published code's outputs have autocast's dtype
        return list(torch.autograd.grad(outputs, [*inputs, *self.module.parameters()], grads))

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

    def kept_bytes(self) -> int:
        """Bytes that autograd keeps from forward to backward, including inputs, without parameters."""
        return bytes_kept_for_backward(lambda: self.call(*self.inputs()), list(self.module.parameters()))

    def candidate(self, backward: bool) -> Candidate:
        step = self.forward_backward if backward else self.forward
        return Candidate(step, partial(self.results, backward), self.kept_bytes if backward else None)


def make_streams(sizes: Sizes, batch: int, device: torch.device, dtype: torch.dtype) -> Streams:
    generator = torch.Generator().manual_seed(batch)
    shapes = [(sizes.clips(batch), sizes.frames, n, sizes.dim) for n in (1 + sizes.patches, sizes.patches)]
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)  # type: ignore[return-value]


def exact_results(sizes: Sizes, batch: int, kind: Kind, device: torch.device, backward: bool) -> dict[str, Tensor]:
    """Outputs and gradients by the reference in fp64 on the device, from inputs that are first rounded to the kind's
    dtype.
    """
    wide = make_module(sizes, backend="eager").to(device, kind.dtype).double()
    spatial, temporal = (x.double() for x in make_streams(sizes, batch, device, kind.dtype))
    variant = Variant(wide, partial(_reference, wide), (spatial, temporal), KINDS["fp32"])
    variant.grads = tuple(g.to(kind.dtype).double() for g in variant.grads)
    return variant.results(backward)


def _reference(module: cast_kernels.BCAST, spatial: Tensor, temporal: Tensor) -> Streams:
    return cast_kernels.reference.bcast(spatial, temporal, module.gathered(), num_heads=module.num_heads)


def run_eager(
    module: cast_kernels.BCAST, spatial: Tensor, temporal: Tensor, context: Callable[[], Any] = nullcontext
) -> Streams:
    with context():
        return cast_kernels.bcast(spatial, temporal, module.gathered(), num_heads=module.num_heads, backend="eager")


def run_onednn(module: cast_kernels.BCAST, spatial: Tensor, temporal: Tensor) -> Streams:
    with OneDNNLinears():
        return run_eager(module, spatial, temporal)


def build(name: str, sizes: Sizes, batch: int, kind: Kind, device: torch.device, backward: bool) -> Candidate:
    """One row's candidate; all rows have the same weights and inputs."""
    mine = options_of(name, device)
    module = make_module(sizes, **(mine or {})).to(device, kind.dtype)
    if mine:
        call: Any = module
    elif name == ONEDNN:
        call = partial(run_onednn, module)
    elif "published" in name:
        call = partial(published, module)
    else:
        call = partial(run_eager, module, context=attending(name.partition(" by ")[2]))
    if name in COMPILED:
        call = compiled(call)
    streams = make_streams(sizes, batch, device, kind.dtype)
    return Variant(module, call, streams, kind, "published" in name).candidate(backward)


def make_work(
    device: str, sizes: Sizes, kind: Kind, batch: int, work: str, rows: tuple[str, ...], machine: Machine
) -> Work:
    backward = work == "training"
    module = make_module(sizes)
    streams = make_streams(sizes, batch, torch.device("meta"), kind.dtype)
    parameters = tensor_bytes(*module.to(kind.dtype).parameters())
    return Work(
        builders={name: partial(build, name, sizes, batch, kind, machine.device, backward) for name in rows},
        exact=partial(exact_results, sizes, batch, kind, machine.device, backward),
        flops=lambda: flops(module.problem(sizes.clips(batch))) * (3 if backward else 1),
        # Streams in and out, and the weights; backward doubles this for the gradients.
        bytes=(2 * tensor_bytes(*streams) + parameters) * (2 if backward else 1),
        kind=kind,
        samples={"cpu": 9 if backward else 15, "cuda": 50}[device],
        predicted=predicted(machine, device, kind.name, sizes.clips(batch), work) if sizes.name == "paper" else {},
    )


@pytest.mark.timeout(3600)
@pytest.mark.benchmark(timer=recorded_time)
def test_bcast(row: Row, measure: Callable[[Row], None]) -> None:
    """One row of its group's interleaved run."""
    measure(row)
