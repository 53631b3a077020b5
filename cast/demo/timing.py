"""Training steps of the fused and the eager model, side by side."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from cast import CAST
from cast.training import Clips

#: Measured rounds.
REPETITIONS = 15


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of a forward and backward pass, one per repetition, and the backends that ran the exchange."""

    batch_size: int
    fused: list[float]
    eager: list[float]
    fused_backend: str

    @property
    def medians(self) -> tuple[float, float]:
        """(fused, eager) in milliseconds."""
        return statistics.median(self.fused), statistics.median(self.eager)


def step_times(model: CAST, clips: Clips, batch_size: int, repetitions: int = REPETITIONS) -> StepTimes:
    """Measure both in turn, so that other load on the machine affects both equally; the first round warms up."""
    videos, labels = clips.batch(0, np.arange(min(batch_size, len(clips))))
    models = {"fused": copy.deepcopy(model).fuse().train(), "eager": copy.deepcopy(model).unfuse().train()}
    device = next(model.parameters()).device
    videos = videos.to(device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repetitions + 1):
        for name, candidate in models.items():
            began = time.perf_counter()
            logits = candidate(videos)
            losses = [F.cross_entropy(logits[head], label.to(device)) for head, label in labels.items()]
            loss = torch.stack(losses).sum()
            loss.backward()
            loss.detach().item()  # waits for an accelerator
            times[name].append(1000 * (time.perf_counter() - began))
    backend = next(iter(models["fused"].blocks)).chosen_backend()  # type: ignore[operator]
    return StepTimes(len(videos), times["fused"][1:], times["eager"][1:], str(backend))
