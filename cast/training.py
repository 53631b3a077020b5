"""One training loop for everything in CAST: AdamW, cosine schedule with warm-up, checkpoints that survive a kill.

Batches are a function of (seed, epoch, position) alone, and a checkpoint holds the weights, the optimizer, the
random generators and the position. So a run that was killed and resumed gives the same bits as one that was not,
on the same machine with the same number of threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

#: File in a checkpoint that is written before the directory gets its final name.
_STATE = "progress.json"


class Clips(Protocol):
    """What can be trained on."""

    def __len__(self) -> int: ...

    def batch(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """The samples `indices` as epoch `epoch` sees them: inputs [B, ...] and labels [B] by head."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW as in the paper (Table 4). What the paper sets otherwise for large data is named below.

    Args:
        epochs: passes over the data.
        batch_size: samples of an optimizer step, over all processes; an incomplete last batch is left out.
        lr: peak learning rate; it rises from 0 over `warmup` epochs, then falls to 0 as a half cosine.
        warmup: epochs (paper: 5).
        weight_decay: on matrices; vectors (biases, norms) and position tables have none.
        layer_decay: block i of L trains at lr * layer_decay ** (L - i), embeddings one step slower, all else at lr
            (paper: 0.75, in the ablations 0.8).
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
        """Learning rate of an optimizer step, counted from 0."""
        warmup, total = self.warmup * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / max(warmup, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


@dataclass
class Progress:
    """Where a training stands. `history` has one entry per finished epoch: mean loss and accuracies in percent."""

    step: int = 0
    seconds: float = 0.0  # spent in training steps, over all runs
    history: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch under way


def train(
    model: nn.Module,
    clips: Clips,
    recipe: Recipe,
    directory: str | os.PathLike[str],
    on_step: Callable[[Progress, dict[str, float]], None] = lambda progress, figures: None,
    on_epoch: Callable[[nn.Module], dict[str, float]] = lambda model: {},
) -> Progress:
    """Train in place, from the last checkpoint in `directory` if it has one.

    Args:
        model: from a batch of inputs to logits by head; parameters that require no gradient stay as they are.
        clips: the data; heads without labels, and labels without a head, are an error.
        recipe: how to train; a checkpoint of another recipe is an error.
        directory: receives checkpoints; only the newest is kept.
        on_step: called after each step with its loss and accuracies, for example to show progress.
        on_epoch: called after each epoch, in evaluation mode; what it returns joins the epoch's history.

    Returns:
        The progress; its `history` has, per epoch, `epoch`, `loss`, accuracy by head, and what `on_epoch` returned.

    Raises:
        ValueError: fewer samples than a batch, a batch that the processes cannot share equally, a checkpoint of
            another recipe, model or number of samples, or a loss that is not finite.
    """
    steps_per_epoch = len(clips) // recipe.batch_size
    if not steps_per_epoch:
        raise ValueError(f"{len(clips)} samples make no batch of {recipe.batch_size}; lower batch_size")
    torch.manual_seed(recipe.seed)
    accelerator = Accelerator()
    if recipe.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size {recipe.batch_size} is not divisible by {accelerator.num_processes} processes; "
            "every process needs the same number of samples"
        )
    identity = {"recipe": asdict(recipe), "samples": len(clips), "model": _fingerprint(model)}
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(_groups(model, recipe), lr=recipe.lr))
    checkpoints = Checkpoints(Path(directory), accelerator, identity)
    progress = checkpoints.load() or Progress()
    while progress.step < recipe.epochs * steps_per_epoch:
        epoch, position = divmod(progress.step, steps_per_epoch)
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(clips))
        indices = order[position * recipe.batch_size : (position + 1) * recipe.batch_size]
        began = time.perf_counter()
        inputs, labels = clips.batch(epoch, indices[accelerator.process_index :: accelerator.num_processes])
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(progress.step, steps_per_epoch) * group["lr_scale"]
        model.train()
        figures = _step(model, optimizer, accelerator, inputs, labels, recipe)
        progress.step += 1
        progress.seconds += time.perf_counter() - began
        progress.sums = {name: progress.sums.get(name, 0.0) + value for name, value in figures.items()}
        on_step(progress, figures)
        if position + 1 == steps_per_epoch:
            means = {name: total / steps_per_epoch for name, total in progress.sums.items()}
            progress.history.append({"epoch": epoch + 1, **means, **on_epoch(model.eval())})
            progress.sums = {}
        if progress.step % (recipe.checkpoint_every or steps_per_epoch) == 0 or position + 1 == steps_per_epoch:
            checkpoints.save(progress)
    model.eval()
    return progress


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    inputs: Tensor,
    labels: Mapping[str, Tensor],
    recipe: Recipe,
) -> dict[str, float]:
    labels = {name: label.to(accelerator.device) for name, label in labels.items()}
    with accelerator.autocast():
        logits = model(inputs.to(accelerator.device))
    if logits.keys() != labels.keys():
        raise ValueError(f"the model has heads {sorted(logits)}, the data labels {sorted(labels)}; they must agree")
    losses = [F.cross_entropy(logits[n].float(), labels[n], label_smoothing=recipe.label_smoothing) for n in labels]
    loss = torch.stack(losses).sum()
    hits = [(logits[name].argmax(1) == label).float().mean() * 100 for name, label in labels.items()]
    values = accelerator.reduce(torch.stack([loss.detach(), *hits]), reduction="mean").tolist()
    if not math.isfinite(values[0]):
        raise ValueError(f"the loss is {values[0]}: training diverged; lower lr {recipe.lr}")
    optimizer.zero_grad(set_to_none=True)
    accelerator.backward(loss)
    optimizer.step()
    return dict(zip(["loss", *labels], values, strict=True))


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Trained parameters by weight decay and by learning-rate scale."""
    names = [name for name, _ in model.named_parameters()]
    depth = max((int(match[1]) + 1 for match in map(_BLOCK.search, names) if match), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            without = parameter.ndim < 2 or name.endswith(("_pos", "positional_embedding"))
            key = (0.0 if without else recipe.weight_decay, layer_scale(name, depth, recipe.layer_decay))
            groups.setdefault(key, []).append(parameter)
    return [{"params": params, "weight_decay": wd, "lr_scale": scale} for (wd, scale), params in groups.items()]


_BLOCK = re.compile(r"blocks\.(\d+)\.")
_EMBEDDING = re.compile(r"(^|\.)(clip_)?(patch_embed|conv1|class_embedding|positional_embedding)\b")


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Learning-rate factor of a parameter: decay^(depth - i) in block i, decay^(depth + 1) in embeddings, else 1.

    New parameters inside a block (adapters, exchange) are slowed down like the block, as in the published code.
    """
    if match := _BLOCK.search(name):
        return decay ** (depth - int(match[1]))
    return decay ** (depth + 1) if _EMBEDDING.search(name) else 1.0


def _fingerprint(model: nn.Module) -> str:
    """Changes with the names, shapes and trained parts of a model's parameters."""
    parts = [f"{name} {tuple(p.shape)} {p.requires_grad}" for name, p in model.named_parameters()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class Checkpoints:
    """The newest state of a training in a directory, whole at any moment."""

    def __init__(self, directory: Path, accelerator: Accelerator, identity: dict[str, Any]) -> None:
        self.directory, self.accelerator, self.identity = directory, accelerator, identity

    def save(self, progress: Progress) -> None:
        """Write under another name, then rename: a kill at any point leaves this or the previous checkpoint whole."""
        final = self.directory / f"step-{progress.step:08d}"
        part = self.directory / "unfinished"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if main:
            state = {"identity": self.identity, "progress": asdict(progress)}
            (part / _STATE).write_text(json.dumps(state, indent=2) + "\n")
            older = self._all()
            os.replace(part, final)
            for path in older:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def load(self) -> Progress | None:
        """Put the newest checkpoint into model, optimizer and generators; None if there is none."""
        found = self._all()
        if not found:
            return None
        state = json.loads((found[-1] / _STATE).read_text())
        if state.get("identity") != self.identity:
            raise ValueError(
                f"{found[-1]} is of another training, {state.get('identity')}; wanted is {self.identity}: "
                "choose another directory, or remove this one"
            )
        self.accelerator.load_state(str(found[-1]))
        return Progress(**state["progress"])

    def _all(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"))
