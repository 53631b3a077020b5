"""Estimate the demo's time: run a miniature of each stage first and measure it."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from cast.demo.clips import CachedClips, Stills
from cast.demo.controls import FEATURES, PLACES, probe, widths
from cast.demo.dataset import MANIFEST, Sizes, make_dataset
from cast.demo.models import SingleStreams, cast_model, spatial_expert, temporal_expert
from cast.demo.plots import blank
from cast.demo.scale import Scale
from cast.demo.scene import SPLITS, render
from cast.demo.schedule import Stage
from cast.demo.study import BothStreams, checkpoint_directory, curve_clips
from cast.demo.timing import REPETITIONS
from cast.evaluation import probabilities
from cast.training import Clips, Progress, Recipe, train

#: Clips of each split in the miniature.
_CLIPS = 16
#: Pictures in the miniature.
_PICTURES = 64
#: Rows and columns of a probe in the miniature.
_ROWS, _COLUMNS = 240, 1024
#: Training steps. The first ones allocate memory and make plans, so they do not count.
_STEPS, _WARM = 6, 2


@dataclass(frozen=True)
class _Repeated:
    """A few samples, repeated to `count`."""

    clips: Clips
    count: int

    def __len__(self) -> int:
        return self.count

    def batch(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """The repeated samples."""
        return self.clips.batch(epoch, indices % len(self.clips))


def estimate(out: Path, seeds: int, scale: Scale) -> list[Stage]:
    """Every stage with its remaining units in `out` and the measured seconds of a unit."""
    with tempfile.TemporaryDirectory() as folder:
        return _Miniature(Path(folder), scale).stages(out, seeds)


class _Miniature:
    """Runs a little of every stage in its own directory, and keeps the seconds of each."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.folder, self.scale = folder, scale
        workers, size = os.cpu_count() or 1, scale.config.image_size
        with _seconds() as first:
            render(0, "train", 0, scale.classes)  # reads the digits and photographs, as each process does
        few = Sizes(*[_CLIPS] * len(SPLITS))
        with _seconds() as made:
            make_dataset(folder, few, workers=1, classes=scale.classes)
        frames = scale.config.num_frames
        plain = CachedClips(folder, "plain", size, ("verb",), frames=frames)  # loads the decoder
        with _seconds() as read:
            clips, val = (CachedClips(folder, split, size, frames=frames) for split in ("train", "val"))
        with _seconds() as drawn:
            stills = Stills(_PICTURES, size, classes=scale.classes)
        noise = np.random.default_rng(0).normal(size=(_ROWS, _COLUMNS)).astype(np.float32)
        labels = {"verb": np.arange(_ROWS) % len(scale.classes.verbs)}
        probe(noise[:, :128], labels, noise[:, :128])  # loads scikit-learn
        with _seconds() as probed:
            probe(noise, labels, noise)
        blank()  # loads matplotlib
        with _seconds() as plotted:
            blank()
        self.start, self.clip = first(), made() / (len(SPLITS) * _CLIPS * workers)
        self.read = read() / (len(clips) + len(val))
        self.still, self.probe, self.plot = drawn() / _PICTURES, probed() / (_ROWS * _COLUMNS), plotted()
        self.steps, self.answers = self._trainings(stills, plain, clips, val)

    def _trainings(
        self, stills: Stills, plain: CachedClips, clips: CachedClips, val: CachedClips
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of a training step of each stage, and of each model's answer for a clip."""
        config, budget = self.scale.config, self.scale.budget
        spatial, temporal = spatial_expert(config, 0), temporal_expert(config, 0)
        steps = {
            "spatial expert": self._step(spatial, stills, budget.spatial),
            "temporal expert": self._step(temporal, plain, budget.temporal),
        }
        answers = {}
        for name in ("alone", "ensemble", "cast"):
            body = cast_model(config, spatial.state_dict(), temporal.state_dict(), 0, exchange=name == "cast")
            model = SingleStreams(config, body) if name == "alone" else body
            asked, test = (BothStreams(part) if name == "alone" else part for part in (clips, val))
            steps[name] = self._step(model, asked, budget.models)
            with _seconds() as answered:
                probabilities(model, test)
            answers[name] = answered() / len(test)
        return steps, answers

    def _step(self, model: nn.Module, clips: Clips, recipe: Recipe) -> float:
        ends: list[float] = []

        def note(progress: Progress, figures: dict[str, float]) -> None:
            ends.append(time.perf_counter())

        recipe = replace(recipe, epochs=1, warmup=1)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            train(model, _Repeated(clips, _STEPS * recipe.batch_size), recipe, folder, note)
        return statistics.median(np.diff(ends)[_WARM - 1 :])

    def stages(self, out: Path, seeds: int) -> list[Stage]:
        """The stages with their remaining units in `out`."""
        sizes, budget = self.scale.sizes, self.scale.budget
        total = sum(sizes.of(split) for split in SPLITS)
        made = (out / "data" / MANIFEST).exists()
        columns = sum(widths(self.scale.config.image_size, place) for place in PLACES)
        probes = len(PLACES) * len(FEATURES)
        stages = [
            Stage("videos", 0 if made else total, self.clip + self.start / total),
            Stage("pictures", budget.stills, self.still),
            Stage("decoding", total, self.read),
            Stage("controls", probes, self.probe * columns * sizes.train / probes),
        ]
        for seed in range(seeds):
            stages += self._seed(out / f"seed-{seed}", f", seed {seed}" if seeds > 1 else "")
        pages = self.plot * 6 + 2 * (REPETITIONS + 1) * self.steps["cast"]
        return [*stages, Stage("report", 1, pages)]

    def _seed(self, root: Path, suffix: str) -> Iterator[Stage]:
        sizes, budget = self.scale.sizes, self.scale.budget
        lengths = {"spatial expert": (budget.spatial, budget.stills), "temporal expert": (budget.temporal, sizes.plain)}
        for name, step in self.steps.items():
            recipe, samples = lengths.get(name, (budget.models, sizes.train))
            per_epoch = samples // recipe.batch_size
            shown = curve_clips(sizes.val) * self.answers.get(name, 0.0)
            rest = max(0, recipe.epochs * per_epoch - _steps_done(checkpoint_directory(root, name)))
            yield Stage(name + suffix, rest, step + shown / max(per_epoch, 1))
        yield Stage("answers" + suffix, 1, sum(self.answers.values()) * sizes.val)


def _steps_done(checkpoints: Path) -> int:
    """Number of training steps in the newest checkpoint."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-" + "[0-9]" * 8)), default=0)


@contextmanager
def _seconds() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the block's time once the block has ended."""
    began, took = time.perf_counter(), 0.0
    yield lambda: took
    took = time.perf_counter() - began
