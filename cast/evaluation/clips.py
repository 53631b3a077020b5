"""Models' answers on a set of clips: probabilities by head, and their mean over an ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cast.training import Clips

#: This epoch number asks a data set for its fixed validation clips.
VALIDATION = -1


@torch.inference_mode()
def probabilities(
    model: nn.Module, clips: Clips, batch_size: int = 50, limit: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Softmax of the logits, by head [clips, classes], and the labels [clips], on the CPU, in the data's order.

    Args:
        model: from inputs to logits by head; it is put into evaluation mode.
        clips: the data; its validation clips are used.
        batch_size: clips at a time; it changes the result only by rounding.
        limit: number of clips from the first; all if None.
    """
    model.eval()
    device = next(model.parameters()).device
    outputs: dict[str, list[Tensor]] = {}
    truths: dict[str, list[Tensor]] = {}
    total = len(clips) if limit is None else min(limit, len(clips))
    for start in range(0, total, batch_size):
        inputs, labels = clips.batch(VALIDATION, np.arange(start, min(start + batch_size, total)))
        for name, logits in model(inputs.to(device)).items():
            outputs.setdefault(name, []).append(logits.float().softmax(-1).cpu())
        for name, label in labels.items():
            truths.setdefault(name, []).append(label)
    return {n: torch.cat(parts) for n, parts in outputs.items()}, {n: torch.cat(parts) for n, parts in truths.items()}


def average(models: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of several models' probabilities, head by head.

    Raises:
        ValueError: no models, or models with different heads.
    """
    if not models or any(model.keys() != models[0].keys() for model in models):
        raise ValueError(f"an ensemble needs models with the same heads, got {[sorted(model) for model in models]}")
    return {name: torch.stack([model[name] for model in models]).mean(0) for name in models[0]}
