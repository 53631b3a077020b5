"""An expert's op with random weights, as CAST runs it: the expert frozen, its adapter trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from groups import GPU_BATCHES, KINDS, Candidate, First, Group, Kind, Sizes, Work
from measure import bytes_kept_for_backward, tensor_bytes
from torch import Tensor
from variants import compiled, options_of, ours

from cast_kernels.gpu.machine import Machine

BASELINE = "eager"
COMPILED = "torch.compile"
WORKS = ("inference", "training")  # forward; forward and the gradients of the input and the adapter
#: The expert decides which tokens attend together: those of a clip, or those of a frame with its CLS.
EXPERTS = ("temporal", "spatial")
#: Device -> (kind, clips) of its groups.
PROBLEMS = {"cpu": [("fp32", 1)], "cuda": [(kind, batch) for batch in GPU_BATCHES for kind in KINDS]}

#: (x, parameters) -> y.
Call = Callable[[Tensor, Any], Tensor]


def shape_of(expert: str, sizes: Sizes, batch: int) -> tuple[int, int]:
    """[batch, tokens] for `batch` clips."""
    clips = sizes.clips(batch)
    return (clips, sizes.frames * sizes.patches) if expert == "temporal" else (clips * sizes.frames, 1 + sizes.patches)


@dataclass(frozen=True)
class Op:
    """A benchmark file's description of its op.

    Args:
        name: of the op.
        parameters: the NamedTuple of its weights, whose last four tensors are the adapter's.
        shapes: of the weights.
        call: (expert, backend, more of our arguments) -> the call.
        reference: expert -> the call in fp64.
        flops: (expert, [batch, tokens], whether with backward) -> floating-point operations.
        peers: (expert, row) -> the call of a row that is neither ours nor eager nor compiled.
        peer_names: device, compute dtype -> the names of those rows.
        first: the groups of tier `first`, by (expert, kind, clips, work).
        experts: the op is measured at their shapes.
        devices: the op is measured on these.
    """

    name: str
    parameters: type
    shapes: Callable[[Sizes], list[tuple[int, ...]]]
    call: Callable[..., Call]
    reference: Callable[[str, Sizes], Call]
    flops: Callable[[Sizes, tuple[int, int], bool], int]
    first: Mapping[tuple[str, str, int, str], First]
    peers: Callable[[str, Sizes, str], Call] | None = None
    peer_names: Callable[[str, torch.dtype], tuple[str, ...]] = lambda device, compute: ()
    experts: tuple[str, ...] = EXPERTS
    devices: tuple[str, ...] = ("cpu", "cuda")

    def groups(self, device: str, sizes: Sizes) -> list[Group]:
        """Every group of a device."""
        found = []
        for kind, batch in PROBLEMS[device] if device in self.devices else ():
            for expert in self.experts:
                for work in WORKS:
                    peers = self.peer_names(device, KINDS[kind].compute)
                    rows = (BASELINE, *peers, COMPILED, *ours(device, work == "training", op=self.name))
                    name = f"{self.name} {expert} {kind} B{batch} {work}"
                    groups, tokens = shape_of(expert, sizes, batch)
                    title = f"{name}: {sizes.dim}, adapter {sizes.adapter}, {groups} x {tokens} tokens"
                    make = partial(self._work, device, expert, sizes, KINDS[kind], batch, work, rows)
                    found.append(Group(name, title, rows, make, self.first.get((expert, kind, batch, work))))
        return found

    def _work(
        self, device: str, expert: str, sizes: Sizes, kind: Kind, batch: int, work: str, rows: tuple[str, ...],
        machine: Machine,
    ) -> Work:  # fmt: skip
        backward = work == "training"
        shape = shape_of(expert, sizes, batch)
        weights = random_parameters(self.parameters, self.shapes(sizes), kind.dtype)
        stream = shape[0] * shape[1] * sizes.dim * kind.dtype.itemsize
        return Work(
            builders={name: partial(self._build, name, expert, sizes, kind, batch, machine, backward) for name in rows},
            exact=partial(self._exact, expert, sizes, kind, batch, machine, backward),
            flops=partial(self.flops, sizes, shape, backward),
            # The stream in and out, and the weights. Backward reads them again and writes two more streams.
            bytes=(2 * stream + tensor_bytes(*weights)) * (2 if backward else 1),
            kind=kind,
            samples={"cpu": 7 if backward else 9, "cuda": 50}[device],
            seconds={"cpu": 60.0, "cuda": 10.0}[device],
        )

    def _build(
        self, name: str, expert: str, sizes: Sizes, kind: Kind, batch: int, machine: Machine, backward: bool
    ) -> Candidate:
        if mine := options_of(name, machine.device):
            call = self.call(expert, sizes, **mine)
        elif name in (BASELINE, COMPILED):
            call = self.call(expert, sizes, backend="eager")
            call = compiled(call) if name == COMPILED else call
        else:
            assert self.peers is not None
            call = self.peers(expert, sizes, name)
        return self._run(call, expert, sizes, kind, batch, machine).candidate(backward)

    def _exact(
        self, expert: str, sizes: Sizes, kind: Kind, batch: int, machine: Machine, backward: bool
    ) -> dict[str, Tensor]:
        run = self._run(self.reference(expert, sizes), expert, sizes, kind, batch, machine)
        return run.double().results(backward)

    def _run(self, call: Call, expert: str, sizes: Sizes, kind: Kind, batch: int, machine: Machine) -> ExpertOp:
        shape = (*shape_of(expert, sizes, batch), sizes.dim)
        return ExpertOp(
            call, shape, random_parameters(self.parameters, self.shapes(sizes), kind.dtype), kind, machine.device
        )


def random_parameters(kind: type, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Any:
    """`kind` of random tensors; none is zero. A leading vector is LayerNorm's weight, around one."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator) * (s[-1] ** -0.5 if len(s) == 2 else 0.1) for s in shapes]
    if tensors[0].ndim == 1:
        tensors[0] = 1 + tensors[0]
    return kind(*(x.to(dtype) for x in tensors))


class ExpertOp:
    """One way to compute an op, forward and with CAST's gradients: of its input and its adapter.

    Args:
        call: (x, parameters) -> y, shaped like x.
        shape: of x.
        parameters: a NamedTuple whose last four tensors are the adapter's.
        kind: dtypes.
        device: where.
    """

    def __init__(
        self, call: Call, shape: tuple[int, ...], parameters: Any, kind: Kind = KINDS["fp32"],
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:  # fmt: skip
        self.call, self.kind = call, kind
        self.parameters = type(parameters)(*(x.to(device) for x in parameters))
        generator = torch.Generator().manual_seed(1)
        self.x, self.grad = (torch.randn(shape, generator=generator).to(device, parameters[0].dtype) for _ in range(2))

    def double(self) -> ExpertOp:
        """Convert to the same numbers in fp64, without autocast."""
        self.kind = KINDS["fp32"]
        self.parameters = type(self.parameters)(*(x.double() for x in self.parameters))
        self.x, self.grad = self.x.double(), self.grad.double()
        return self

    def _call(self) -> Tensor:
        with self.kind.context(self.x.device):
            return self.call(self.x, self.parameters)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self._call()

    def training_forward(self) -> Tensor:
        for tensor in (self.x, *self.parameters[-4:]):
            tensor.requires_grad_(True)
        return self._call()

    def forward_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.training_forward(), [self.x, *self.parameters[-4:]], self.grad)

    def results(self, backward: bool) -> dict[str, Tensor]:
        named = {"y": self.forward()}
        if backward:
            named |= {f"grad.{i}": grad for i, grad in enumerate(self.forward_backward())}
        return named

    def kept_bytes(self) -> int:
        """Bytes that autograd keeps from forward to backward, including the input, without parameters."""
        return bytes_kept_for_backward(self.training_forward, list(self.parameters))

    def candidate(self, backward: bool) -> Candidate:
        step = self.forward_backward if backward else self.forward
        return Candidate(step, partial(self.results, backward), self.kept_bytes if backward else None)
