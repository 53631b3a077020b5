"""`cast train`: from a recipe to a finished model in a directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from safetensors import SafetensorError
from torch import Tensor, nn

from cast.training.checkpoints import Checkpoints
from cast.training.distributed import join_processes, make_accelerator, on_main
from cast.training.engine import Engine, Mix, Plan
from cast.training.files import CheckpointError, write_text
from cast.training.log import Log, check_trackers
from cast.training.models import Model, blueprint, build, compile_blocks, how_to_use, save_finished, whole_weights
from cast.training.progress import Progress
from cast.training.recipes import parse
from cast.training.schedule import cosine
from cast.training.settings import TrainSettings
from cast.training.simple import fingerprint, videos_digest
from cast.video.datasets import open_dataset
from cast.video.loader import ClipLoader

_DESCRIPTION = (
    "Train CAST by a recipe: a YAML file, or the name of one that comes with the package. Any setting can be "
    "overridden as key=value, such as optim.lr=5e-4."
)
_SWITCHES = {"resume": "go on from the newest checkpoint in the output directory, if there is one"}

#: Settings that a resumed training may change: where things lie, who is told, what does not change the mathematics.
_FREE = (
    "out", "log", "checkpoint", "experts.clip", "experts.videomae", "experts.spatial", "experts.temporal",
    "experts.cast", "experts.trust_pickle", "run.compile", "run.fused", "run.recompute", "run.attention",
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
    """Train by a recipe; the finished model lies in `<out>/model`, with averaged weights in `<out>/model-ema`.

    Args:
        settings: the recipe.
        resume: whether to go on from the newest checkpoint in `<out>/checkpoints`.
        recipe: the settings as YAML, kept as `<out>/settings.yaml`.

    Raises:
        ValueError: settings that do not fit each other, the data or the weights, or a loss that is not finite.
        OSError: a file that is missing, damaged or cannot be written, or checkpoints that `resume` should name.
        MissingExtraError: a tracker that is not installed.
    """
    check_trackers(list(settings.log.trackers))
    optim, out = settings.optim, settings.directory
    processes = join_processes()
    accumulate = optim.accumulate(processes.num_processes)
    accelerator = make_accelerator(
        settings.run.precision,
        accumulate,
        optim.micro_batch,
        optim.clip_grad,
        list(settings.log.trackers),
        str(out),
    )
    videos = open_dataset(settings.data)
    train = videos.samples("train")
    model, notes = build(settings, videos.classes)
    loader = ClipLoader(
        train, settings.data, optim.micro_batch, True, settings.seed, processes.process_index, processes.num_processes
    )
    plan = make_plan(settings, len(loader) // accumulate, accumulate, len(train))
    checkpoints = Checkpoints(
        out / "checkpoints",
        accelerator,
        {
            "settings": identity(settings),
            "samples": len(train),
            "videos": videos_digest(train, settings.data.root),
            "model": fingerprint(model),
        },
        model,
        settings.checkpoint.weights,
        settings.checkpoint.keep,
    )
    if not resume and checkpoints.all():
        raise FileExistsError(
            f"{out} has a training already ({checkpoints.all()[-1].name}): add --resume to go on, or choose another out"
        )
    if settings.run.compile:
        compile_blocks(model, settings.run.compile)
    make, use = blueprint(model), how_to_use(model, out / "model")
    engine = Engine(model, loader, plan, accelerator, checkpoints, make_mix(settings, videos.classes))
    validate = Validation(settings, videos.samples("val"), accelerator) if _validates(settings, videos.splits) else None
    log = Log(out, accelerator, plan.steps, _plain(settings), settings.log.bars, settings.log.every)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "settings.yaml", recipe or json.dumps(_plain(settings), indent=2))

    def on_epoch(unwrapped: nn.Module) -> dict[str, float]:
        progress, epoch = engine.progress, engine.progress.step // plan.steps_per_epoch
        figures: dict[str, float] = {}
        if validate is not None and (epoch % settings.validate_every == 0 or epoch == plan.epochs):
            figures = {f"val {name}": value for name, value in validate(unwrapped).items()}
            if engine.average is not None:
                with engine.average.applied():
                    figures |= {f"val ema {name}": value for name, value in validate(unwrapped).items()}
        means = {name: total / plan.steps_per_epoch for name, total in progress.sums.items()}
        log.epoch(progress, {"epoch": epoch, **means, **figures})
        return figures

    done = ""
    try:
        log.start(engine.progress, _summary(settings, plan, engine.progress, model, processes, notes))
        progress = engine.run(log.step, on_epoch)
        _finish(engine, accelerator, make, videos.classes, out)
        done = f"finished: {use}"
    except KeyboardInterrupt:
        done = "stopped; the same command with --resume goes on from the newest checkpoint"
        raise
    finally:
        log.end(done)
    return progress


def make_plan(settings: TrainSettings, steps_per_epoch: int, accumulate: int, clips: int) -> Plan:
    """The recipe in the loop's numbers.

    Raises:
        ValueError: too few clips for one step.
    """
    optim = settings.optim
    if not steps_per_epoch:
        raise ValueError(f"{clips} videos make no step of optim.total_batch={optim.total_batch} clips; lower it")
    steps = optim.epochs * steps_per_epoch
    mixed = settings.data.augment.mixup > 0 or settings.data.augment.cutmix > 0
    return Plan(
        epochs=optim.epochs,
        steps_per_epoch=steps_per_epoch,
        accumulate=accumulate,
        micro_batch=optim.micro_batch,
        rate=cosine(optim.peak, optim.floor, round(optim.warmup_epochs * steps_per_epoch), steps),
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay,
        smoothing=0.0 if mixed else settings.data.augment.smoothing,  # Mixing smooths by itself
        clip_grad=optim.clip_grad,
        ema=optim.ema,
        betas=optim.betas,
        seed=settings.seed,
        checkpoint_every=settings.checkpoint.every,
    )


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

    def __init__(self, settings: TrainSettings, samples: Sequence[Any], accelerator: Accelerator) -> None:
        self.accelerator, self.heads = accelerator, tuple(samples[0].labels)
        rank, world = accelerator.process_index, accelerator.num_processes
        self.loader = ClipLoader(samples, settings.data, settings.optim.micro_batch, False, 0, rank, world)
        # Sharded weights are gathered in every forward pass, so all processes must make equally many.
        self.even = accelerator.distributed_type == "FSDP" and world > 1
        if self.even and len(samples) < world:
            raise ValueError(f"{len(samples)} validation videos are fewer than {world} processes; set validate_every=0")

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`loss` and accuracy by head, for a model in evaluation mode."""
        # Of each process: loss, hits of each head, clips; a process may have no video at all.
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
        return torch.stack([loss, *hits, loss.new_tensor(len(batch.names))]).double()


def identity(settings: TrainSettings) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from."""
    values = _plain(settings)
    for name in _FREE:
        section, _, key = name.partition(".")
        if key:
            values[section].pop(key)
        else:
            values.pop(section)
    return values


def _plain(settings: TrainSettings) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return plain


def _validates(settings: TrainSettings, splits: Sequence[str]) -> bool:
    return settings.validate_every > 0 and "val" in splits


def _summary(
    settings: TrainSettings, plan: Plan, progress: Progress, model: nn.Module, processes: PartialState, notes: list[str]
) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"{plan.steps} steps ({_count(plan.epochs, 'epoch')} of {plan.steps_per_epoch}) of "
        f"{settings.optim.total_batch} clips = {plan.micro_batch} x {plan.accumulate} micro-batches x "
        f"{_count(processes.num_processes, 'process')} on "
        f"{processes.device.type}; peak learning rate {settings.optim.peak:.3g}; {trained:,} parameters train",
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
    classes: Mapping[str, Sequence[str]],
    out: Path,
) -> None:
    models = {"model": whole_weights(engine.unwrapped)}
    if engine.average is not None:
        models["model-ema"] = models["model"] | engine.average.read()

    def save() -> None:
        for name, tensors in models.items():
            try:
                save_finished(make, tensors, classes, out / name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"cannot write {out / name}: {error}. The last checkpoint is whole: make room, then start again "
                    "with --resume, which writes the model without training again"
                ) from None

    on_main(accelerator, save)
