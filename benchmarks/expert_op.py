"""An expert's op with random weights, run as CAST runs it: the expert frozen, its adapter trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from compare import Candidate
from measure import bytes_kept_for_backward
from torch import Tensor


def random_parameters(kind: type, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Any:
    """`kind` of random tensors, so that nothing multiplies by zero; the first is LayerNorm's weight, around one."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator) * (s[-1] ** -0.5 if len(s) == 2 else 0.1) for s in shapes]
    return kind(*(x.to(dtype) for x in (1 + tensors[0], *tensors[1:])))


class ExpertOp:
    """One way to compute an op, forward and with the gradients that CAST wants: of its input and its adapter.

    Args:
        call: (x, parameters) -> y, shaped like x.
        shape: of x.
        parameters: a NamedTuple whose last four tensors are the adapter's.
    """

    def __init__(self, call: Callable[[Tensor, Any], Tensor], shape: tuple[int, ...], parameters: Any) -> None:
        self.call, self.parameters, self.adapter = call, parameters, parameters[-4:]
        generator = torch.Generator().manual_seed(1)
        self.x, self.grad = (torch.randn(shape, generator=generator).to(parameters[0].dtype) for _ in range(2))

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(self.x, self.parameters)

    def training_forward(self) -> Tensor:
        for tensor in (self.x, *self.adapter):
            tensor.requires_grad_(True)
        return self.call(self.x, self.parameters)

    def forward_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.training_forward(), [self.x, *self.adapter], self.grad)

    def results(self, backward: bool) -> dict[str, Tensor]:
        named = {"y": self.forward()}
        if backward:
            named |= {f"grad.{i}": grad for i, grad in enumerate(self.forward_backward())}
        return named

    def kept_mib(self) -> float:
        """MiB that autograd keeps from forward to backward, the input included, parameters not."""
        return bytes_kept_for_backward(self.training_forward, list(self.parameters)) / 2**20

    def candidate(self, backward: bool) -> Candidate:
        step = self.forward_backward if backward else self.forward
        return Candidate(step, partial(self.results, backward), self.kept_mib if backward else None)


def rows_of(calls: dict[str, Any], work: str) -> list[str]:
    """The rows of a group: forward alone keeps nothing, whatever `recompute` says."""
    return [name for name in calls if work != "forward" or "recompute" not in name]
