"""Fused and unfused training under autocast end at the same accuracy on the digits videos, not only step by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from training_cases import Batch

from cast import CAST
from cast.demo.clips import normalise
from cast.demo.models import CONFIG, initialise
from cast.demo.scene import plan as scene_of
from cast.demo.scene import render
from cast.training import Checkpoints, Engine, Plan, cosine
from cast.training.distributed import Precision, make_accelerator

TRAIN, VAL, BATCH, EPOCHS = 960, 480, 32, 14


def clips(first: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Plain clips of one digit each at half their side, uint8 [count, 16, 3, 32, 32], with their labels."""
    pictures, labels = [], {"verb": [], "noun": []}  # type: ignore[var-annotated]
    for index in range(first, first + count):
        frames = render(0, "plain", index)[1::2]
        small = frames.reshape(16, 32, 2, 32, 2, 3).astype(np.float32).mean((2, 4)).round().astype(np.uint8)
        pictures.append(torch.from_numpy(small).permute(0, 3, 1, 2))
        scene, _ = scene_of(0, "plain", index)
        labels["verb"].append(scene.verb)
        labels["noun"].append(scene.noun)
    return torch.stack(pictures), {name: torch.tensor(values) for name, values in labels.items()}


def as_video(pixels: Tensor) -> Tensor:
    return normalise(pixels).transpose(1, 2).contiguous()


class Source:
    """Shuffled anew in each epoch."""

    def __init__(self, pixels: Tensor, labels: dict[str, Tensor]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels) // BATCH

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self.pixels), generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(BATCH)[start : len(self)]:
            video = as_video(self.pixels[chosen])
            yield Batch(video, {name: label[chosen] for name, label in self.labels.items()}, [""] * BATCH)


def accuracies(
    directory: Path, fused: bool, precision: Precision, data: tuple[Source, tuple[Tensor, dict[str, Tensor]]]
) -> dict[str, float]:
    """Percent right on clips that were not trained on."""
    torch.manual_seed(0)
    model = initialise(CAST(CONFIG).requires_grad_(True))
    model.fuse() if fused else model.unfuse()
    source, (pixels, labels) = data
    accelerator = make_accelerator(precision)
    steps = len(source)
    plan = Plan(EPOCHS, steps, 1, BATCH, cosine(2e-3, 0.0, steps // 2, EPOCHS * steps))
    engine = Engine(model, source, plan, accelerator, Checkpoints(directory, accelerator, {"plan": "test"}, model))
    progress = engine.run()
    with torch.inference_mode(), accelerator.autocast():
        logits = [model(as_video(part)) for part in pixels.split(BATCH)]
    right = {
        name: (torch.cat([part[name] for part in logits]).argmax(1) == label).float().mean()
        for name, label in labels.items()
    }
    return {name: 100 * float(value) for name, value in right.items()} | {"loss": progress.history[-1]["loss"]}


@pytest.mark.heavy
def test_fused_and_unfused_training_under_autocast_reach_the_same_accuracy(tmp_path: Path) -> None:
    """Seven minutes on one core; with half the clips and epochs nothing is learned. docs/training.md has fp32, too."""
    data = Source(*clips(0, TRAIN)), clips(TRAIN, VAL)
    eager, fused = (accuracies(tmp_path / str(fused), fused, "bf16", data) for fused in (False, True))
    assert min(eager["verb"], fused["verb"]) > 50, (eager, fused)  # of 12 verbs: 8.3 by chance
    assert abs(fused["verb"] - eager["verb"]) < 3, (eager, fused)
    assert abs(fused["noun"] - eager["noun"]) < 3, (eager, fused)
    assert fused["loss"] == pytest.approx(eager["loss"], rel=5e-3)
