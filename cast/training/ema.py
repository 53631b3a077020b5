"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cast.training.tensors import put, whole


class Average:
    """Average of a model's trained parameters: average <- decay * average + (1 - decay) * weight after each step.

    Frozen parameters have no average, so the memory equals that of the trained parameters.

    Args:
        model: the model in training, with its parameters on their final device.
        decay: share of the old average that stays (the official code's flag, off by default there: 0.9999).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._weights.items()}
        self._mix = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after one step to the average."""
        self._mix(tuple(self._average.values()), tuple(p.detach() for p in self._weights.values()), 0)

    def read(self) -> dict[str, Tensor]:
        """The averages by parameter, whole, on the CPU."""
        return {name: whole(tensor) for name, tensor in self._average.items()}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the averages that :meth:`read` returned."""
        for name, tensor in tensors.items():
            put(self._average[name], tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While active, the model's weights are the averages."""
        kept = {name: p.detach().clone() for name, p in self._weights.items()}
        with torch.no_grad():
            for name, parameter in self._weights.items():
                parameter.copy_(self._average[name])
            try:
                yield
            finally:
                for name, parameter in self._weights.items():
                    parameter.copy_(kept[name])
