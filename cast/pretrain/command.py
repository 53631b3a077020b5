"""`cast pretrain`: from videos without labels to the weights of a temporal expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from cast.ground.optional import require
from cast.pretrain.model import Reconstruction, VideoMAE
from cast.pretrain.picture import draw
from cast.pretrain.settings import PretrainSettings
from cast.pretrain.videos import unlabelled
from cast.training.distributed import on_main
from cast.training.engine import Engine, Plan
from cast.training.models import compile_blocks, whole_weights
from cast.training.progress import Progress
from cast.training.recipes import parse
from cast.training.session import Session, writing
from cast.video.annotations import Sample
from cast.video.loader import ClipLoader
from cast.video.sampling import stride_indices

_DESCRIPTION = (
    "Pre-train a temporal expert on videos without labels, as a masked autoencoder (VideoMAE). RECIPE is a YAML file "
    "or the name of one that comes with the package; any setting can be overridden as key=value, such as data.root=DIR."
)
_SWITCHES = {"resume": "go on from the newest checkpoint in the output directory, if there is one"}

#: Settings that a resumed pre-training may change.
_FREE = (
    "out", "log", "checkpoint", "pictures", "run.compile", "run.graphs", "run.deterministic", "run.fused",
    "data.root", "data.workers", "data.decoder", "data.skip_list", "optim.micro_batch",
)  # fmt: skip

#: File with the encoder and the decoder, in VideoMAE's official layout.
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
        ValueError: impossible sizes or mask.
    """
    torch.manual_seed(settings.seed)
    return VideoMAE(
        settings.model, settings.decoder, settings.mask_ratio, settings.normalised, fused=settings.run.fused
    )


def fit(settings: PretrainSettings, resume: bool = False, recipe: str = "") -> Progress:
    """Pre-train by a recipe; the weights are written to `<out>/videomae.safetensors`.

    Args:
        settings: the recipe.
        resume: whether to continue from the newest checkpoint in `<out>/checkpoints`.
        recipe: the settings as YAML, kept as `<out>/settings.yaml`.

    Raises:
        ValueError: settings that do not fit each other or the data, or a loss that is not finite.
        OSError: a file that is missing, damaged or cannot be written; or a training in `out` already, without `resume`.
        MissingExtraError: a tracker, or matplotlib for the picture, is not installed.
    """
    if settings.pictures:
        require("matplotlib", "demo")  # fails now, and not after 800 epochs
    free = _FREE if settings.data.sampling == "dense" else (*_FREE, "stride")
    session = Session(settings, free, resume, recipe)
    samples, note = unlabelled(settings.data, "train")
    shown = _shown(settings, samples)
    model = build(settings)
    loader = session.loader(samples, partial(stride_indices, stride=settings.stride))
    plan = session.plan(loader, len(samples))
    checkpoints = session.checkpoints(model, samples)
    if settings.run.compile:
        for part in (model.encoder, model.decoder):
            compile_blocks(part, settings.run.compile)
    engine = Engine(model, loader, plan, session.accelerator, checkpoints, criterion=criterion)

    def finish() -> str:
        _finish(engine, session.accelerator, settings, shown)
        return f"{session.out / WEIGHTS} loads as experts.videomae= of cast train and CAST.load_experts(videomae=...)"

    return session.run(engine, f"{_summary(settings, plan, model)}\n{note}", lambda model, epoch: {}, finish)


def criterion(answers: Reconstruction, targets: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The reconstruction's loss; there are no labels."""
    return answers.loss(), {}


def _finish(engine: Engine, accelerator: Accelerator, settings: PretrainSettings, shown: Tensor | None) -> None:
    tensors = whole_weights(engine.unwrapped)
    if engine.average is not None:
        tensors |= engine.average.read()

    def save() -> None:
        finished = build(settings)
        finished.load_state_dict(tensors)
        with writing(settings.directory / WEIGHTS):
            finished.save(settings.directory / WEIGHTS)
        if shown is not None:
            draw(finished, shown, settings.directory / PICTURE)

    on_main(accelerator, save)


def _shown(settings: PretrainSettings, train: Sequence[Sample]) -> Tensor | None:
    """The first clips of the validation videos, or of the training videos if there are no others."""
    samples = unlabelled(settings.data, "val")[0] if settings.data.val else train
    chosen = samples[: settings.pictures]
    if not chosen:
        return None
    return next(iter(ClipLoader(chosen, replace(settings.data, workers=0), len(chosen), False).batches(0))).video


def _summary(settings: PretrainSettings, plan: Plan, model: VideoMAE) -> str:
    encoder, everything = (sum(p.numel() for p in part.parameters()) for part in (model.encoder, model))
    visible = len(model.draw(1).visible[0])
    return (
        f"{plan.steps} steps ({plan.epochs} epochs of {plan.steps_per_epoch}) of {settings.optim.total_batch} clips; "
        f"peak learning rate {settings.optim.peak:.3g}; {everything:,} parameters train, {encoder:,} of them in the "
        f"encoder, which sees {visible} of {model.pos_embed.shape[1]} tokens"
    )
