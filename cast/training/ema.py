"""An exponential moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cast.training.tensors import put, whole


class Average:
    """Follows the trained parameters of a model: average <- decay * average + (1 - decay) * weight after each step.

    Frozen parameters have no average, so it costs as much memory as what trains.

    Args:
        model: the model that trains, where its parameters are during training.
        decay: share of the old average that stays (the official code's flag, off by default there: 0.9999).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._weights.items()}
        self._mix = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take one step's weights into account."""
        self._mix(tuple(self._average.values()), tuple(p.detach() for p in self._weights.values()), 0)

    def read(self) -> dict[str, Tensor]:
        """The averages by parameter, whole, on the CPU."""
        return {name: whole(tensor) for name, tensor in self._average.items()}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """What :meth:`read` returned."""
        for name, tensor in tensors.items():
            put(self._average[name], tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averages as its weights."""
        kept = {name: p.detach().clone() for name, p in self._weights.items()}
        with torch.no_grad():
            for name, parameter in self._weights.items():
                parameter.copy_(self._average[name])
            try:
                yield
            finally:
                for name, parameter in self._weights.items():
                    parameter.copy_(kept[name])
