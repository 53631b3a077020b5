"""`cast pretrain`: from videos without labels to the weights of a temporal expert."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from safetensors import SafetensorError
from torch import Tensor, nn

from cast.optional import require
from cast.pretrain.model import Reconstruction, VideoMAE
from cast.pretrain.picture import draw
from cast.pretrain.settings import PretrainSettings
from cast.pretrain.videos import unlabelled
from cast.training.checkpoints import Checkpoints
from cast.training.distributed import join_processes, make_accelerator, on_main
from cast.training.engine import Engine, Plan
from cast.training.files import CheckpointError, write_text
from cast.training.log import Log, check_trackers
from cast.training.models import compile_blocks, whole_weights
from cast.training.progress import Progress
from cast.training.recipes import parse
from cast.training.schedule import cosine
from cast.training.simple import fingerprint, videos_digest
from cast.video.annotations import Sample
from cast.video.loader import ClipLoader

_DESCRIPTION = (
    "Pre-train a temporal expert on videos without labels, as a masked autoencoder (VideoMAE). RECIPE is a YAML file "
    "or the name of one that comes with the package; any setting can be overridden as key=value, such as data.root=DIR."
)
_SWITCHES = {"resume": "go on from the newest checkpoint in the output directory, if there is one"}

#: Settings that a resumed pre-training may change.
_FREE = ("out", "log", "checkpoint", "pictures")

#: The encoder and the decoder, in VideoMAE's official layout.
WEIGHTS = "videomae.safetensors"
PICTURE = "reconstruction.png"


def main(arguments: Sequence[str]) -> None:
    """Run `cast pretrain` with the words after it.

    Raises:
        SystemExit: 2 after bad usage.
        ValueError, OSError, MissingExtraError: it cannot run; the message says why and what to do.
    """
    command = parse(PretrainSettings, arguments, "pretrain", _DESCRIPTION, _SWITCHES)
    settings = command.settings
    if not settings.out:
        settings = replace(settings, out=str(Path("runs") / command.recipe.stem))
    fit(settings, "resume" in command.switches, command.yaml)
    PartialState().destroy_process_group()


def build(settings: PretrainSettings) -> VideoMAE:
    """The autoencoder before the first step, in fp32 on the CPU.

    Raises:
        ValueError: sizes or a mask that no model can have.
    """
    torch.manual_seed(settings.seed)
    return VideoMAE(
        settings.model, settings.decoder, settings.mask_ratio, settings.normalised, fused=settings.run.fused
    )


def fit(settings: PretrainSettings, resume: bool = False, recipe: str = "") -> Progress:
    """Pre-train by a recipe; the weights lie in `<out>/videomae.safetensors`.

    Args:
        settings: the recipe.
        resume: whether to go on from the newest checkpoint in `<out>/checkpoints`.
        recipe: the settings as YAML, kept as `<out>/settings.yaml`.

    Raises:
        ValueError: settings that do not fit each other or the data, or a loss that is not finite.
        OSError: a file that is missing, damaged or cannot be written, or checkpoints that `resume` should name.
        MissingExtraError: a tracker, or matplotlib for the picture, is not installed.
    """
    check_trackers(list(settings.log.trackers))
    if settings.pictures:
        require("matplotlib", "demo")  # now, rather than after 800 epochs
    out = settings.directory
    accelerator = _accelerator(settings, join_processes())
    samples, note = unlabelled(settings.data, "train")
    shown = _shown(settings, samples)
    model = build(settings)
    loader = ClipLoader(
        samples,
        settings.data,
        settings.optim.micro_batch,
        True,
        settings.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    plan = _plan(settings, loader, accelerator)
    checkpoints = Checkpoints(
        out / "checkpoints",
        accelerator,
        {
            "settings": _identity(settings),
            "samples": len(samples),
            "videos": videos_digest(samples, settings.data.root),
            "model": fingerprint(model),
        },
        model,
        keep=settings.checkpoint.keep,
    )
    if not resume and checkpoints.all():
        raise FileExistsError(
            f"{out} has a pre-training already ({checkpoints.all()[-1].name}): add --resume to go on, or choose "
            "another out"
        )
    if settings.run.compile:
        for part in (model.encoder, model.decoder):
            compile_blocks(part, settings.run.compile)
    engine = Engine(model, loader, plan, accelerator, checkpoints, criterion=criterion)
    log = Log(out, accelerator, plan.steps, _plain(settings), settings.log.bars, settings.log.every)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "settings.yaml", recipe or json.dumps(_plain(settings), indent=2))

    def on_epoch(unwrapped: nn.Module) -> dict[str, float]:
        means = {name: total / plan.steps_per_epoch for name, total in engine.progress.sums.items()}
        log.epoch(engine.progress, {"epoch": engine.progress.step // plan.steps_per_epoch, **means})
        return {}

    done = ""
    try:
        log.start(engine.progress, f"{_summary(settings, plan, model)}\n{note}")
        progress = engine.run(log.step, on_epoch)
        _finish(engine, accelerator, settings, shown)
        done = f"finished: {out / WEIGHTS} loads as experts.videomae= of cast train and CAST.load_experts(videomae=...)"
    finally:
        log.end(done)
    return progress


def criterion(answers: Reconstruction, targets: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The reconstruction's loss; there are no labels."""
    return answers.loss(), {}


def _accelerator(settings: PretrainSettings, processes: PartialState) -> Accelerator:
    optim = settings.optim
    return make_accelerator(
        settings.run.precision,
        optim.accumulate(processes.num_processes),
        optim.micro_batch,
        optim.clip_grad,
        list(settings.log.trackers),
        str(settings.directory),
    )


def _plan(settings: PretrainSettings, loader: ClipLoader, accelerator: Accelerator) -> Plan:
    optim = settings.optim
    accumulate = optim.accumulate(accelerator.num_processes)
    per_epoch = len(loader) // accumulate
    if not per_epoch:
        raise ValueError(
            f"{len(loader)} micro-batches make no step of optim.total_batch={optim.total_batch} clips; lower it"
        )
    return Plan(
        epochs=optim.epochs,
        steps_per_epoch=per_epoch,
        accumulate=accumulate,
        micro_batch=optim.micro_batch,
        rate=cosine(optim.peak, optim.floor, round(optim.warmup_epochs * per_epoch), optim.epochs * per_epoch),
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay,
        clip_grad=optim.clip_grad,
        ema=optim.ema,
        betas=optim.betas,
        seed=settings.seed,
        checkpoint_every=settings.checkpoint.every,
    )


def _finish(engine: Engine, accelerator: Accelerator, settings: PretrainSettings, shown: Tensor | None) -> None:
    tensors = whole_weights(engine.unwrapped)
    if engine.average is not None:
        tensors |= engine.average.read()

    def save() -> None:
        finished = build(settings)
        finished.load_state_dict(tensors)
        try:
            finished.save(settings.directory / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot write {settings.directory / WEIGHTS}: {error}. The last checkpoint is whole: make room, then "
                "start again with --resume, which writes the weights without training again"
            ) from None
        if shown is not None:
            draw(finished, shown, settings.directory / PICTURE)

    on_main(accelerator, save)


def _shown(settings: PretrainSettings, train: Sequence[Sample]) -> Tensor | None:
    """The first clips of the validation videos, or of the training videos where there are no others."""
    samples = unlabelled(settings.data, "val")[0] if settings.data.val else train
    chosen = samples[: settings.pictures]
    if not chosen:
        return None
    return next(iter(ClipLoader(chosen, replace(settings.data, workers=0), len(chosen), False).batches(0))).video


def _identity(settings: PretrainSettings) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from."""
    values = _plain(settings)
    for name in _FREE:
        values.pop(name)
    for section, keys in (("data", ("root", "workers", "decoder", "skip_list")), ("run", ("compile", "fused"))):
        for key in keys:
            values[section].pop(key)
    values["optim"].pop("micro_batch")
    return values


def _plain(settings: PretrainSettings) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return plain


def _summary(settings: PretrainSettings, plan: Plan, model: VideoMAE) -> str:
    encoder, everything = (sum(p.numel() for p in part.parameters()) for part in (model.encoder, model))
    visible = len(model.draw(1).visible[0])
    return (
        f"{plan.steps} steps ({plan.epochs} epochs of {plan.steps_per_epoch}) of {settings.optim.total_batch} clips; "
        f"peak learning rate {settings.optim.peak:.3g}; {everything:,} parameters train, {encoder:,} of them in the "
        f"encoder, which sees {visible} of {model.pos_embed.shape[1]} tokens"
    )
