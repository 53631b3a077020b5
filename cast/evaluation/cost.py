"""A model's cost: parameters and multiply-accumulates."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class ModelCost:
    """Sizes of a model; `gmacs` are 10^9 multiply-accumulates of one clip, forward."""

    parameters: int
    learnable: int
    gmacs: float


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(all, learnable) parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)


def model_cost(model: nn.Module, frames: int, size: int) -> ModelCost:
    """Cost of a model on one clip [1, 3, frames, size, size].

    PyTorch's flop counter counts on a copy without memory (device `meta`). It counts matrix products and convolutions,
    as the paper does. The paper's "391 GFLOPs/View" are multiply-accumulates of the base model (table 2); this gives
    390.5.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    video = torch.empty(1, 3, frames, size, size, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        shadow(video)
    return ModelCost(*parameter_counts(model), gmacs=counter.get_total_flops() / 2e9)
