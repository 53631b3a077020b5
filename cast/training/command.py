"""`cast train`: from a recipe to a finished model in a directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from cast.training.distributed import on_main
from cast.training.engine import Engine, Mix, Plan
from cast.training.models import Model, blueprint, build, compile_blocks, how_to_use, save_finished, whole_weights
from cast.training.progress import Progress
from cast.training.recipes import parse
from cast.training.session import Session, writing
from cast.training.settings import TrainSettings
from cast.video.datasets import VideoSet, open_dataset
from cast.video.loader import ClipLoader

_DESCRIPTION = (
    "Train CAST by a recipe: a YAML file, or the name of one that comes with the package. Any setting can be "
    "overridden as key=value, such as optim.lr=5e-4."
)
_SWITCHES = {"resume": "go on from the newest checkpoint in the output directory, if there is one"}

#: Settings that a resumed training may change: paths, logs, and settings that do not change the mathematics.
FREE = (
    "out", "log", "checkpoint", "experts.clip", "experts.videomae", "experts.spatial", "experts.temporal",
    "experts.cast", "experts.trust_pickle", "run.compile", "run.graphs", "run.deterministic", "run.fused",
    "run.recompute", "run.attention",
    "data.root", "data.workers", "data.decoder", "data.skip_list", "optim.micro_batch", "validate_every",
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Run `cast train` with the words after it.

    Raises:
        SystemExit: 2 after bad usage.
        ValueError, OSError, MissingExtraError: the training cannot run; the message says why and what to do.
    """
    command = parse(TrainSettings, arguments, "train", _DESCRIPTION, _SWITCHES)
    settings = command.settings
    if not settings.out:
        settings = replace(settings, out=str(Path("runs") / command.recipe.stem))
    fit(settings, "resume" in command.switches, command.yaml)
    PartialState().destroy_process_group()


def fit(settings: TrainSettings, resume: bool = False, recipe: str = "") -> Progress:
    """Train by a recipe. The finished model is written to `<out>/model`, one with averaged weights to
    `<out>/model-ema`.

    Args:
        settings: the recipe.
        resume: whether to continue from the newest checkpoint in `<out>/checkpoints`.
        recipe: the settings as YAML, kept as `<out>/settings.yaml`.

    Raises:
        ValueError: settings that do not fit each other, the data or the weights; or a loss that is not finite.
        OSError: a file that is missing, damaged or cannot be written; or a training in `out` already, without `resume`.
        MissingExtraError: a tracker that is not installed.
    """
    session = Session(settings, FREE, resume, recipe)
    accelerator, out = session.accelerator, session.out
    videos = open_dataset(settings.data)
    train = videos.samples("train")
    model, notes = build(settings, videos.classes)
    loader = session.loader(train)
    mix = make_mix(settings, videos.classes)
    # Mixing smooths the labels itself.
    plan = session.plan(loader, len(train), 0.0 if mix is not None else settings.data.augment.smoothing)
    checkpoints = session.checkpoints(model, train)
    if settings.run.compile:
        compile_blocks(model, settings.run.compile)
    make, use = blueprint(model), how_to_use(model, out / "model")
    engine = Engine(model, loader, plan, accelerator, checkpoints, mix)
    validation = (
        Validation(settings, videos.samples("val"), accelerator)
        if settings.validate_every > 0 and "val" in videos.splits
        else None
    )

    def validate(unwrapped: nn.Module, epoch: int) -> dict[str, float]:
        if validation is None or (epoch % settings.validate_every and epoch != plan.epochs):
            return {}
        figures = {f"val {name}": value for name, value in validation(unwrapped).items()}
        if engine.average is not None:
            with engine.average.applied():
                figures |= {f"val ema {name}": value for name, value in validation(unwrapped).items()}
        return figures

    def finish() -> str:
        _finish(engine, accelerator, make, videos, out)
        return use

    note = _summary(settings, plan, engine.progress, model, accelerator, notes)
    return session.run(engine, note, validate, finish)


def make_mix(settings: TrainSettings, classes: Mapping[str, Sequence[str]]) -> Mix | None:
    """The recipe's mixup and CutMix, or None if it has neither."""
    augment = settings.data.augment
    if not (augment.mixup > 0 or augment.cutmix > 0):
        return None
    from cast.video.mixing import Mixing

    mixing, counts = Mixing.of(augment), {head: len(names) for head, names in classes.items()}

    def mix(video: Tensor, labels: Mapping[str, Tensor], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        return mixing(video, labels, counts, seed)

    return mix


class Validation:
    """Loss and accuracies in percent on one centre view of each validation video, exact for any number of processes.

    Args:
        settings: the recipe.
        samples: the validation videos.
        accelerator: of the training.
    """

    accelerator: Any
    heads: tuple[Any, ...]

    def __init__(self, settings: TrainSettings, samples: Sequence[Any], accelerator: Accelerator) -> None:
        self.accelerator, self.heads = accelerator, tuple(samples[0].labels)
        if not self.heads:
            raise ValueError("the validation videos (data.val) have no labels; set data.val=null or validate_every=0")
        rank, world = accelerator.process_index, accelerator.num_processes
        self.loader: ClipLoader = ClipLoader(samples, settings.data, settings.optim.micro_batch, False, 0, rank, world)
        # FSDP gathers sharded weights in every forward pass, so all processes must run equally many.
        self.even: Any = accelerator.distributed_type == "FSDP" and world > 1
        if self.even and len(samples) < world:
            raise ValueError(f"{len(samples)} validation videos are fewer than {world} processes; set validate_every=0")

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`loss` and accuracy by head, for a model in evaluation mode."""
        # For each process: loss, hits of each head, clips. A process may have no video at all.
        total = torch.zeros(len(self.heads) + 2, dtype=torch.float64, device=self.accelerator.device)
        last = None
        for last in self.loader.batches(0):
            total += self._sums(model, last)
        if self.even and last is not None:
            most = int(self.accelerator.gather(torch.tensor([len(self.loader)], device=self.accelerator.device)).max())
            for _ in range(len(self.loader), most):
                self._sums(model, last)
        loss, *hits, count = self.accelerator.reduce(total, reduction="sum").tolist()
        return {"loss": loss / count, **{name: 100 * n / count for name, n in zip(self.heads, hits, strict=True)}}

    def _sums(self, model: nn.Module, batch: Any) -> Tensor:
        """[loss, hits of each head, clips] summed over the batch."""
        ready = batch.to(self.accelerator.device)
        with self.accelerator.autocast():
            logits = {name: value.float() for name, value in model(ready.video).items()}
        losses = [F.cross_entropy(logits[name], ready.labels[name], reduction="sum") for name in self.heads]
        hits = [(logits[name].argmax(1) == ready.labels[name]).sum() for name in self.heads]
        loss = torch.stack(losses).sum()
        return torch.stack([loss, *hits, loss.new_full((), len(batch.names))]).double()


def _summary(
    settings: TrainSettings,
    plan: Plan,
    progress: Progress,
    model: nn.Module,
    accelerator: Accelerator,
    notes: list[str],
) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"{plan.steps} steps ({_count(plan.epochs, 'epoch')} of {plan.steps_per_epoch}) of "
        f"{settings.optim.total_batch} clips = {plan.micro_batch} x {plan.accumulate} micro-batches x "
        f"{_count(accelerator.num_processes, 'process')} on "
        f"{accelerator.device.type}; peak learning rate {settings.optim.peak:.3g}; {trained:,} parameters train",
        *notes,
    ]
    if progress.step:
        lines.append(f"going on after step {progress.step}")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def _finish(
    engine: Engine,
    accelerator: Accelerator,
    make: Callable[[], Model],
    videos: VideoSet,
    out: Path,
) -> None:
    models = {"model": whole_weights(engine.unwrapped)}
    if engine.average is not None:
        models["model-ema"] = models["model"] | engine.average.read()

    def save() -> None:
        for name, tensors in models.items():
            with writing(out / name):
                how = videos.settings
                save_finished(make, tensors, videos.classes, how.sampling, out / name, how.short_side)

    on_main(accelerator, save)
