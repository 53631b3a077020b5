"""The engine for samples in memory, with a recipe of a few numbers: for the demo and small experiments."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cast.ground.transfer import to_device
from cast.training.checkpoints import Checkpoints
from cast.training.distributed import make_accelerator
from cast.training.engine import Criterion, Engine, Plan
from cast.training.groups import grouped_otherwise_before
from cast.training.identity import changed_rules, fingerprint
from cast.training.progress import Progress


class Clips(Protocol):
    """Training samples by index."""

    def __len__(self) -> int: ...

    def batch(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """The samples `indices` in the form of epoch `epoch`: inputs [B, ...] and labels [B] by head."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A training's numbers: AdamW as in the paper (Table 4). The paper's values for large data are in brackets.

    Args:
        epochs: passes over the data.
        batch_size: samples of an optimizer step, over all processes; an incomplete last batch is omitted.
        lr: peak learning rate; it rises over `warmup` epochs, then falls to 0 as a half cosine.
        warmup: epochs (paper: 5).
        weight_decay: on matrices; vectors (biases, norms) and position tables (except CLIP's own) have none.
        layer_decay: block i of L trains at lr * layer_decay ** (L - i), parameters before block 0 at one power more,
            all others at lr (paper: 0.75, in the ablations 0.8).
        label_smoothing: of the cross-entropy (paper: 0.1); the heads' losses are added with equal weight.
        seed: of the batches' order and of PyTorch's generators.
        checkpoint_every: optimizer steps between checkpoints; 0 writes one at the end of each epoch.
    """

    epochs: int
    batch_size: int
    lr: float
    warmup: float = 1.0
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    label_smoothing: float = 0.0
    seed: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; it must be positive")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be above 0 and at most 1")
        if not 0 <= self.warmup <= self.epochs:
            raise ValueError(f"warmup is {self.warmup} epochs; it must be from 0 to epochs = {self.epochs}")

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of an optimizer step, counted from 0. The first step already has its share of the warm-up."""
        warmup, total = self.warmup * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / max(warmup, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

    def plan(self, samples: int, processes: int) -> Plan:
        """The recipe in the engine's numbers.

        Raises:
            ValueError: fewer samples than a batch, or a batch that the processes cannot share equally.
        """
        per_epoch = samples // self.batch_size
        if not per_epoch:
            raise ValueError(f"{samples} samples make no batch of {self.batch_size}; lower batch_size")
        if self.batch_size % processes:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by {processes} processes; "
                "every process needs the same number of samples"
            )
        return Plan(
            epochs=self.epochs,
            steps_per_epoch=per_epoch,
            accumulate=1,
            micro_batch=self.batch_size // processes,
            rate=lambda step: self.rate(step, per_epoch),
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            smoothing=self.label_smoothing,
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
        )


@dataclass(frozen=True)
class _Batch:
    video: Tensor
    labels: dict[str, Tensor]
    names: list[str]

    def to(self, device: torch.device) -> _Batch:
        labels = {name: to_device(label, device) for name, label in self.labels.items()}
        return _Batch(to_device(self.video, device), labels, self.names)


class _Shuffled:
    """Clips in a new order each epoch; every process gets its share of each batch."""

    def __init__(self, clips: Clips, recipe: Recipe, rank: int, world: int) -> None:
        self.clips, self.recipe, self.rank, self.world = clips, recipe, rank, world

    def __len__(self) -> int:
        return len(self.clips) // self.recipe.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[_Batch]:
        size = self.recipe.batch_size
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self.clips))
        for position in range(start, len(self)):
            indices = order[position * size : (position + 1) * size][self.rank :: self.world]
            inputs, labels = self.clips.batch(epoch, indices)
            yield _Batch(inputs, labels, [f"sample {index}" for index in indices])


def train(
    model: nn.Module,
    clips: Clips,
    recipe: Recipe,
    directory: str | os.PathLike[str],
    on_step: Callable[[Progress, dict[str, float]], None] = lambda progress, figures: None,
    on_epoch: Callable[[nn.Module], dict[str, float]] = lambda model: {},
    criterion: Criterion | None = None,
) -> Progress:
    """Train in place, in fp32, from the last checkpoint in `directory` if it has one.

    Args:
        model: from a batch of inputs to logits by head; parameters without gradients stay frozen.
        clips: the data; a head without labels, or labels without a head, is an error.
        recipe: the training's numbers; a checkpoint of another recipe is an error.
        directory: receives checkpoints; only the newest is kept.
        on_step: called after each step with its loss and accuracies, for example to show progress.
        on_epoch: called after each epoch, in evaluation mode; its result joins the epoch's history.
        criterion: computes the loss; if None the sum of the heads' cross-entropies.

    Returns:
        The progress; its `history` has, per epoch, `epoch`, `loss`, accuracy by head, and what `on_epoch` returned.

    Raises:
        ValueError: fewer samples than a batch, a batch that the processes cannot share equally, a checkpoint of
            another recipe, model or number of samples, or a loss that is not finite (DivergenceError).
        CheckpointError: a checkpoint cannot be written or read.
    """
    accelerator = make_accelerator()
    plan = recipe.plan(len(clips), accelerator.num_processes)
    rules = changed_rules(groups=grouped_otherwise_before(model, recipe.weight_decay, recipe.layer_decay))
    identity = {"recipe": asdict(recipe), "samples": len(clips), "model": fingerprint(model), **rules}
    source = _Shuffled(clips, recipe, accelerator.process_index, accelerator.num_processes)
    checkpoints = Checkpoints(directory, accelerator, identity, model)
    engine = Engine(model, source, plan, accelerator, checkpoints, criterion=criterion)
    return engine.run(lambda progress, step: on_step(progress, step.figures), on_epoch)
