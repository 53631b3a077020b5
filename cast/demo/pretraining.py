"""Compare a temporal expert that starts from VideoMAE with one from scratch, on the digits videos.

    python -m cast.demo.pretraining --out runs/pretraining

Both train on the same labelled clips, for the same number of steps, with the same seeds. Pre-training uses only the
same clips, without labels.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from torch import Tensor

from cast.demo.clips import CachedClips
from cast.demo.dataset import Sizes, make_dataset
from cast.demo.models import CONFIG, temporal_expert
from cast.evaluation import probabilities
from cast.ground.files import write_json
from cast.pretrain import DecoderSettings, VideoMAE
from cast.pretrain.command import PICTURE, WEIGHTS, criterion
from cast.pretrain.picture import draw
from cast.training import Recipe, train


@dataclass(frozen=True)
class Budget:
    """The sizes of the comparison, for one core and minutes.

    Args:
        clips: number of training clips, the same with and without labels.
        test: number of other clips, for the accuracy.
        pretrain: epochs of pre-training.
        finetune: epochs with labels.
        lr: learning rate of the epochs with labels.
        mask_ratio: hidden share of the patches in pre-training.
        normalised: whether each patch's target has mean 0 and deviation 1. Backgrounds are photographs of textures,
            which no model can predict. If normalised, a dark texture counts as much as the digit.
    """

    clips: int = 1440
    test: int = 720
    pretrain: int = 20
    finetune: int = 6
    lr: float = 1e-3
    mask_ratio: float = 0.5
    normalised: bool = False


class Part:
    """A range of clips, with or without labels."""

    clips: CachedClips
    first: int
    count: int
    labels: bool

    def __init__(self, clips: CachedClips, first: int, count: int, labels: bool = True) -> None:
        self.clips, self.first, self.count, self.labels = clips, first, count, labels

    def __len__(self) -> int:
        return self.count

    def batch(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch of CachedClips, with verbs or without labels."""
        videos, labels = self.clips.batch(epoch, indices + self.first)
        return videos, {"verb": labels["verb"]} if self.labels else {}


def pretrain(clips: Part, budget: Budget, seed: int, out: Path) -> list[dict[str, float]]:
    """Pre-train and write weights and a picture; returns the loss of each epoch."""
    torch.manual_seed(seed)
    model = VideoMAE(CONFIG, DecoderSettings(depth=2), budget.mask_ratio, budget.normalised)
    recipe = Recipe(epochs=budget.pretrain, batch_size=16, lr=2e-3, warmup=budget.pretrain / 20, seed=seed)
    history = train(model, clips, recipe, out / "pretraining", criterion=criterion).history
    model.save(out / WEIGHTS)
    return history


def finetune(
    name: str, train_clips: Part, test: Part, budget: Budget, seed: int, out: Path, start: Path | None
) -> float:
    """Accuracy on the test clips, in percent, after training with labels."""
    model = temporal_expert(CONFIG, seed)
    if start is not None:
        model.load(start)
    recipe = Recipe(epochs=budget.finetune, batch_size=8, lr=budget.lr, warmup=0.5, seed=seed)
    train(model, train_clips, recipe, out / name)
    answers, truths = probabilities(model, test)
    return float((answers["verb"].argmax(1) == truths["verb"]).float().mean() * 100)


def run(out: Path = Path("runs/pretraining"), seeds: int = 3, budget: Budget | None = None) -> dict[str, Any]:
    """Compare, write results.json and a picture, print a table.

    Args:
        out: directory for videos, checkpoints and results; a killed run continues.
        seeds: number of seeds.
        budget: the sizes of the comparison.
    """
    budget, console = budget or Budget(), Console(width=120)
    sizes = Sizes(plain=budget.clips + budget.test, train=120, val=120)
    make_dataset(out / "data", sizes)
    clips = CachedClips(out / "data", "plain", CONFIG.image_size, heads=("verb",))
    labelled, unlabelled = Part(clips, 0, budget.clips), Part(clips, 0, budget.clips, labels=False)
    test = Part(clips, budget.clips, budget.test)
    rows: list[Mapping[str, float]] = []
    losses: list[list[float]] = []
    for seed in range(seeds):
        folder = out / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        history = pretrain(unlabelled, budget, seed, folder)
        losses.append([entry["loss"] for entry in history])
        row = {
            "scratch": finetune("scratch", labelled, test, budget, seed, folder, None),
            "pre-trained": finetune("pre-trained", labelled, test, budget, seed, folder, folder / WEIGHTS),
        }
        rows.append(row)
        shown = ", ".join(f"{name} {accuracy:.1f} %" for name, accuracy in row.items())
        console.print(f"seed {seed}: loss {losses[-1][0]:.3f} to {losses[-1][-1]:.3f}; verb accuracy: {shown}")
    draw(VideoMAE.read(out / "seed-0" / WEIGHTS), test.batch(-1, np.arange(3))[0], out / PICTURE)
    means = {
        name: [statistics.mean(row[name] for row in rows), statistics.pstdev(row[name] for row in rows)]
        for name in rows[0]
    }
    result = {"budget": asdict(budget), "seeds": rows, "losses": losses, "mean and deviation": means}
    write_json(out / "results.json", result)
    for name, (mean, deviation) in means.items():
        console.print(f"{name:12} {mean:.1f} ± {deviation:.1f} % of verbs, {seeds} seeds")
    return result


if __name__ == "__main__":
    auto_cli(run)
