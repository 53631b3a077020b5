"""A step's loss, accuracies and gradient length: collected and checked on the device, read by the host once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """The figures of a step on the host.

    Args:
        values: means over the global batch by name, `loss` among them.
        length: of the gradient before clipping; None if unknown.
        bad: whether the loss or the gradient was not finite; the weights then kept their values.
    """

    values: dict[str, float]
    length: float | None
    bad: bool


class Figures:
    """Figures of a step's micro-batches; they stay on the device until `read`."""

    def __init__(self) -> None:
        self._parts: list[Mapping[str, Tensor]] = []
        self._names: list[str] = []
        self._told: Tensor | None = None
        self._has_length = False

    def add(self, part: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's figures, each a tensor of one number."""
        self._parts.append(part)

    def judge(self, accelerator: Accelerator, length: Tensor | None) -> Tensor:
        """Compute means over micro-batches and processes, and whether they are finite, without a wait for the device.

        Args:
            accelerator: of the training. All processes must call this; each gets the same answer.
            length: of the gradient of all processes, or None.

        Returns:
            float32 [], 1 if the loss or the length is infinite or NaN, else 0.
        """
        self._names, self._has_length = list(self._parts[0]), length is not None
        sums = torch.stack([torch.stack([part[name] for name in self._names]) for part in self._parts]).mean(0)
        means = accelerator.reduce(sums, reduction="mean").double()
        judged = means[self._names.index("loss")]
        if length is not None:
            length = length.double()
            judged = judged + length.abs()  # infinite or NaN if one of the two is
            means = torch.cat((means, length[None]))
        bad = ~judged.isfinite()
        self._told = torch.cat((means, bad[None].double()))
        return bad.float()

    def read(self) -> Outcome:
        """The result of `judge`: the step's only wait for the device."""
        assert self._told is not None
        *told, bad = self._told.tolist()
        length = told.pop() if self._has_length else None
        return Outcome(dict(zip(self._names, told, strict=True)), length, bool(bad))

    def broken(self) -> list[bool]:
        """For each of this process's micro-batches, whether its loss is not finite."""
        return [not math.isfinite(float(part["loss"])) for part in self._parts]
