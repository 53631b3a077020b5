"""All settings of a recipe, typed. The defaults are the paper's for EPIC-KITCHENS-100 (Table 4)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cast.baselines import DESIGNS, SINGLES
from cast.model.config import CASTConfig
from cast.training.checkpoints import Weights
from cast.training.determinism import ATTENTIONS
from cast.training.distributed import Precision
from cast.video.datasets import DataSettings

#: This word instead of a file: timm downloads the weights.
DOWNLOAD = "download"


@dataclass(frozen=True)
class ExpertSettings:
    """The two experts and their connection, or a whole CAST to start from.

    Args:
        design: the connection of the experts: cast, another construction of the paper's tables by its name in
            cast.baselines.DESIGNS (lateral, late-add, clip-mvd, ...), or single-spatial or single-temporal for one
            expert with all heads.
        clip: file with CLIP's image tower (OpenAI's archive, open_clip, timm, transformers).
        videomae: file with VideoMAE's encoder (official layout or transformers).
        spatial: file of the expert in the spatial role, if it is neither CLIP nor VideoMAE; for an expert of timm also
            the word download, for its own weights.
        temporal: the same for the temporal role.
        cast: checkpoint of a whole CAST to start from instead (a directory of save_pretrained, or an official file);
            heads with another number of classes start anew.
        train: whether the experts train too; the paper freezes them. Only then may an expert start from random weights.
        trust_pickle: whether these files may run code while they load; set it only for authors whom you trust.
    """

    design: str = "cast"
    clip: str | None = None
    videomae: str | None = None
    spatial: str | None = None
    temporal: str | None = None
    cast: str | None = None
    train: bool = False
    trust_pickle: bool = False

    def __post_init__(self) -> None:
        if self.cast and (self.clip or self.videomae):
            raise ValueError("experts.cast has both experts already: leave out experts.clip and experts.videomae")
        if self.design == "ensemble":
            raise ValueError(
                "experts.design is 'ensemble', which does not train: train single-spatial and single-temporal, then "
                "average their answers (see docs/study.md)"
            )
        if self.design not in (*DESIGNS, *SINGLES):
            close = difflib.get_close_matches(self.design, [*DESIGNS, *SINGLES], 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"experts.design is {self.design!r}; {hint}There are {', '.join([*DESIGNS, *SINGLES])}")
        if self.cast and self.design != "cast":
            raise ValueError(
                f"experts.cast is a whole CAST, experts.design {self.design!r} has other parts: leave one out"
            )
        for role in ("spatial", "temporal"):
            if getattr(self, role) == DOWNLOAD and not self.roles.get(role, "").startswith("timm:"):
                raise ValueError(f"experts.{role} is {DOWNLOAD!r}, which is for experts of timm; give a file")
        named = {"clip": self.clip, "videomae": self.videomae, "spatial": self.spatial, "temporal": self.temporal}
        for name, value in named.items():
            if value and name not in self.sources:
                raise ValueError(
                    f"experts.{name} is given, but design {self.design!r} takes {', '.join(self.sources)} only"
                )

    @property
    def roles(self) -> dict[str, str]:
        """Role -> its expert; a single expert has one role."""
        if self.design in SINGLES:
            return {self.design.removeprefix("single-"): SINGLES[self.design][0]}
        design = DESIGNS[self.design]
        return {"spatial": design.spatial, "temporal": design.temporal}

    @property
    def sources(self) -> list[str]:
        """Settings with the weights of these experts: CLIP's and VideoMAE's by their names, others' by their roles."""
        named = {name if name in ("clip", "videomae") else role: None for role, name in self.roles.items()}
        return list(named)


@dataclass(frozen=True)
class OptimSettings:
    """AdamW (eps 1e-8) and its schedule.

    Args:
        epochs: passes over the data.
        total_batch: clips of an optimizer step, over all processes and micro-batches.
        micro_batch: clips that one process computes at a time; lower it if memory runs out. Accumulated micro-batches =
            total_batch / (micro_batch x processes).
        lr: peak learning rate for 256 clips; the actual one is lr x total_batch / 256.
        min_lr: end of the cosine, scaled like lr.
        warmup_epochs: epochs in which the rate rises from 0.
        weight_decay: of matrices; vectors and tables of positions (except CLIP's own, if it trains) have none.
        layer_decay: block i of L trains at rate x layer_decay^(L - i).
        clip_grad: greatest length of the gradient; null for no clipping.
        ema: share of the old average that stays after each step, such as 0.9999; null for no average.
        betas: shares of the gradient's running mean and mean square that stay after each step.
    """

    epochs: int = 50
    total_batch: int = 384
    micro_batch: int = 6
    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_epochs: float = 5
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    clip_grad: float | None = None
    ema: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        for name in ("epochs", "total_batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be at least 1")
        if not self.lr > 0 or not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"optim.lr is {self.lr}, optim.min_lr {self.min_lr}; needed is lr > 0, 0 <= min_lr <= lr")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(f"optim.warmup_epochs is {self.warmup_epochs}; it must be from 0 to epochs {self.epochs}")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay is {self.weight_decay}; it must not be negative")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay is {self.layer_decay}; it must be above 0 and at most 1")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"optim.clip_grad is {self.clip_grad}; it must be positive, or null for no clipping")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas is {self.betas}; it must be two numbers from 0 to below 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"optim.ema is {self.ema}; it must lie between 0 and 1, or be null for no average")

    @property
    def peak(self) -> float:
        """Learning rate at the top of the schedule."""
        return self.lr * self.total_batch / 256

    @property
    def floor(self) -> float:
        """Learning rate at the end of the schedule."""
        return self.min_lr * self.total_batch / 256

    def accumulate(self, processes: int) -> int:
        """Micro-batches of an optimizer step in each process.

        Raises:
            ValueError: they do not add up to the total batch; the message names micro-batches that would.
        """
        if self.total_batch % (self.micro_batch * processes):
            share, left = divmod(self.total_batch, processes)
            fitting = [n for n in range(1, share + 1) if share % n == 0] if not left else []
            advice = (
                f"choose optim.micro_batch out of {', '.join(map(str, fitting))}"
                if fitting
                else f"choose optim.total_batch as a multiple of {processes}"
            )
            raise ValueError(
                f"optim.total_batch {self.total_batch} is not made of whole micro-batches of {self.micro_batch} on "
                f"{processes} process{'es' if processes > 1 else ''}: {advice}"
            )
        return self.total_batch // (self.micro_batch * processes)


@dataclass(frozen=True)
class RunSettings:
    """Settings of the computation; they change the mathematics only by rounding.

    Args:
        precision: of products; weights stay fp32. fp16 needs a GPU.
        fused: whether compiled kernels may run; otherwise only eager PyTorch.
        recompute: values that backward computes again in fused kernels: nothing, cheap parts or all; auto decides by
            the memory of the GPU, or without a GPU by that of the machine.
        stream_dtype: dtype of CAST's residual streams: auto, float32; autocast, that of precision, which must not be
            fp32.
        attention: attention kernel of the experts on a GPU: auto, sdpa, math, flash-attn, xformers.
        compile: backend of torch.compile for the blocks, such as inductor; null for no compilation.
        graphs: whether forward and backward of a micro-batch are replayed as a CUDA graph, which saves the host their
            launches; for one process on a GPU.
        deterministic: whether two trainings on a GPU give the same bits, which costs time; an operator without a
            deterministic version is an error that names it. With false, attention's backward pass adds in the order in
            which its parts finish.
    """

    precision: Precision = "bf16"
    fused: bool = True
    recompute: Literal["auto", "nothing", "cheap", "all"] = "auto"
    stream_dtype: Literal["auto", "autocast"] = "auto"
    attention: Literal["auto", "sdpa", "math", "flash-attn", "xformers"] = "auto"
    compile: str | None = None
    graphs: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.stream_dtype == "autocast" and self.precision == "fp32":
            raise ValueError(
                "run.stream_dtype is autocast and run.precision fp32, which has no autocast; choose bf16 or fp16, or "
                "leave run.stream_dtype at auto"
            )
        if self.deterministic and self.attention not in ATTENTIONS:
            raise ValueError(
                f"run.deterministic=true, but run.attention={self.attention} adds in a varying order; choose "
                f"{', '.join(ATTENTIONS)}"
            )


@dataclass(frozen=True)
class CheckpointSettings:
    """The times and contents of checkpoints.

    Args:
        every: optimizer steps between checkpoints; 0 writes one at the end of each epoch only.
        keep: number of newest checkpoints that stay.
        weights: trainable omits the frozen experts (180 MB instead of 870 for CAST-B/16); full has everything.
    """

    every: int = 0
    keep: int = 2
    weights: Weights = "trainable"

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise ValueError(
                f"checkpoint.every is {self.every}, checkpoint.keep {self.keep}; needed is every >= 0, keep >= 1"
            )


@dataclass(frozen=True)
class LogSettings:
    """Outputs for the user. log.jsonl is always written.

    Args:
        trackers: any of tensorboard and wandb.
        bars: progress bars on a terminal; otherwise a line per epoch.
        every: optimizer steps between lines of log.jsonl and between trackers' points.
    """

    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    bars: bool = True
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every is {self.every}; it must be at least 1")


@dataclass(frozen=True)
class RecipeSettings:
    """The settings of every recipe.

    Args:
        data: videos, annotations, sampling, augmentation.
        model: sizes and switches of the model.
        optim: optimizer, batch and schedule.
        run: precision, kernels, compilation.
        checkpoint: states from which a killed training resumes.
        log: progress and figures.
        out: directory for checkpoints, log.jsonl, settings.yaml and the finished model; empty for runs/<recipe>.
        seed: of the data's order, augmentation, new weights, drop path and masks.
    """

    data: DataSettings
    model: CASTConfig = field(default_factory=CASTConfig)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)
    out: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for ours, theirs in (("image_size", "size"), ("num_frames", "frames")):
            if getattr(self.model, ours) != getattr(self.data, theirs):
                raise ValueError(
                    f"model.{ours} is {getattr(self.model, ours)}, data.{theirs} {getattr(self.data, theirs)}; "
                    "the model sees the data's clips, so they must be equal"
                )

    @property
    def directory(self) -> Path:
        """The output directory."""
        return Path(self.out)


@dataclass(frozen=True)
class TrainSettings(RecipeSettings):
    """A recipe of `cast train`; CAST's heads come from the data, and the finished model goes to <out>/model.

    Args:
        experts: the initial weights of the model.
        validate_every: epochs between validations (one centre view of each validation video); 0 for none.
    """

    experts: ExpertSettings = field(default_factory=ExpertSettings)
    validate_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validate_every < 0:
            raise ValueError(f"validate_every is {self.validate_every}; it must be 0 or more epochs")
