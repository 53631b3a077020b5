"""The parts of `cast train` and `cast pretrain` around the engine, equal for both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from cast.ground.processes import join_processes
from cast.training.checkpoints import Checkpoints, planned_videos
from cast.training.determinism import ask_cublas, deterministic
from cast.training.distributed import make_accelerator, on_main
from cast.training.engine import Engine, Plan
from cast.training.files import CheckpointError, write_text
from cast.training.groups import grouped_otherwise_before
from cast.training.identity import changed_rules, fingerprint, lasting, video_hashes, videos_digest
from cast.training.log import Log, check_trackers
from cast.training.plain import plain
from cast.training.progress import Progress
from cast.training.schedule import cosine
from cast.training.settings import RecipeSettings
from cast.video.annotations import Sample
from cast.video.loader import ClipLoader
from cast.video.sampling import Choose, train_indices

#: (model in evaluation mode, epoch counted from 1) -> figures that join the epoch's history.
Validate = Callable[[nn.Module, int], dict[str, float]]


class Session:
    """One training by a recipe, from the start of the processes to the finished files.

    Args:
        settings: the recipe.
        free: settings that a resumed training may change, such as `out` and `data.root`.
        resume: whether to continue from the newest checkpoint in `<out>/checkpoints`.
        recipe: the settings as YAML, kept as `<out>/settings.yaml`.

    Raises:
        ValueError: a batch or a precision that is impossible with these processes.
        MissingExtraError: a tracker that is not installed.
    """

    settings: RecipeSettings
    free: Sequence[str]
    resume: bool
    recipe: str

    def __init__(self, settings: RecipeSettings, free: Sequence[str], resume: bool, recipe: str) -> None:
        trackers: list[str] = list(settings.log.trackers)
        check_trackers(trackers)
        self.settings, self.free, self.resume, self.recipe = settings, free, resume, recipe
        self.out: Path = settings.directory
        if settings.run.deterministic:
            ask_cublas()
        self._began_with = planned_videos(self.out / "checkpoints") if resume else None
        optim = settings.optim
        self.accumulate: int = optim.accumulate(join_processes().num_processes)
        self.accelerator: Any = make_accelerator(
            settings.run.precision, self.accumulate, optim.micro_batch, optim.clip_grad, trackers, str(self.out),
            settings.run.graphs,
        )  # fmt: skip

    def loader(self, samples: Sequence[Sample], choose: Choose = train_indices) -> ClipLoader:
        """The training clips of this process. A resumed training keeps the length of its epochs."""
        settings = self.settings
        return ClipLoader(
            samples,
            settings.data,
            settings.optim.micro_batch,
            train=True,
            seed=settings.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            planned=self._planned(samples),
            choose=choose,
        )

    def _planned(self, samples: Sequence[Sample]) -> int:
        """Number of videos at the start of the training."""
        return self._began_with or len(samples)

    def plan(self, loader: ClipLoader, clips: int, smoothing: float = 0.0) -> Plan:
        """The recipe in the loop's numbers.

        Raises:
            ValueError: too few clips for one step.
        """
        optim = self.settings.optim
        per_epoch = len(loader) // self.accumulate
        if not per_epoch:
            raise ValueError(f"{clips} videos make no step of optim.total_batch={optim.total_batch} clips; lower it")
        return Plan(
            epochs=optim.epochs,
            steps_per_epoch=per_epoch,
            accumulate=self.accumulate,
            micro_batch=optim.micro_batch,
            rate=cosine(optim.peak, optim.floor, round(optim.warmup_epochs * per_epoch), optim.epochs * per_epoch),
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
            smoothing=smoothing,
            clip_grad=optim.clip_grad,
            ema=optim.ema,
            betas=optim.betas,
            seed=self.settings.seed,
            checkpoint_every=self.settings.checkpoint.every,
            graphs=self.settings.run.graphs,
        )

    def checkpoints(self, model: nn.Module, samples: Sequence[Sample]) -> Checkpoints:
        """The checkpoints of this training.

        Raises:
            FileExistsError: `out` has a training already, and `resume` is off.
        """
        checkpoints = Checkpoints(
            self.out / "checkpoints",
            self.accelerator,
            {
                "settings": lasting(self.settings, self.free),
                "samples": self._planned(samples),
                "videos": videos_digest(samples, self.settings.data.root),
                "model": fingerprint(model),
                **self._changed_rules(model),
            },
            model,
            self.settings.checkpoint.weights,
            self.settings.checkpoint.keep,
            video_hashes(samples, self.settings.data.root),
        )
        if not self.resume:
            on_main(self.accelerator, lambda: self._refuse_another(checkpoints))
        return checkpoints

    def _changed_rules(self, model: nn.Module) -> dict[str, list[str]]:
        """The rules that this training uses and that an earlier version had otherwise (docs/training.md)."""
        data, optim = self.settings.data, self.settings.optim
        return changed_rules(
            dense=data.sampling == "dense",
            multiscale=bool(data.augment.multiscale),
            erasing=data.augment.erasing > 0,
            groups=grouped_otherwise_before(model, optim.weight_decay, optim.layer_decay),
        )

    @staticmethod
    def _lost(checkpoints: Checkpoints) -> str:
        """A line about training videos that are gone since the start, or nothing."""
        planned = checkpoints.identity["samples"]
        if checkpoints.videos is None or (left := len(checkpoints.videos)) == planned:
            return ""
        return (
            f"\n{left} of the {planned} training videos that this training began with are left. Its "
            "schedule and the steps of an epoch stay; from here on each epoch draws its order from those left"
        )

    def _begin(self) -> None:
        """Create the directory and write the recipe, so that an unwritable `out` fails before the first step."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(self.out / "settings.yaml", self.recipe or json.dumps(plain(self.settings), indent=2))
        except OSError as error:
            raise OSError(f"cannot write into {self.out}: {error.strerror or error}; choose another out") from None

    def _refuse_another(self, checkpoints: Checkpoints) -> None:
        if found := checkpoints.all():
            raise FileExistsError(
                f"{self.out} has a training already ({found[-1].name}): add --resume to go on, or choose another out"
            )
        if (self.out / "log.jsonl").exists():
            raise FileExistsError(
                f"{self.out} has the log.jsonl of a training without checkpoints: choose another out, or add --resume "
                "to begin anew in this one, which overwrites it"
            )

    def run(self, engine: Engine, note: str, validate: Validate, finish: Callable[[], str]) -> Progress:
        """Train to the end.

        Args:
            engine: made with this session's plan and checkpoints.
            note: printed at the beginning.
            validate: called after each epoch.
            finish: called at the end; its result names the finished files.
        """
        settings = self.settings
        log = Log(self.out, self.accelerator, engine.plan.steps, plain(settings), settings.log.bars, settings.log.every)
        on_main(self.accelerator, self._begin)
        done = ""
        try:
            log.start(engine.progress, note + self._lost(engine.checkpoints))
            with deterministic(settings.run.deterministic):
                progress = engine.run(log.step, lambda model: validate(model, engine.epoch), log.epoch)
            done = f"finished: {finish()}"
        except KeyboardInterrupt:
            done = "stopped; the same command with --resume goes on from the newest checkpoint"
            raise
        finally:
            log.end(done)
        return progress


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing a finished file into a CheckpointError.

    Raises:
        CheckpointError: the write failed; the message says how to repeat it without training again.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}. The last checkpoint is whole: make room, then start again with --resume, "
            "which writes it without training again"
        ) from None
