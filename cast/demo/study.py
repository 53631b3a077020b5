"""One seed of the demo's experiment: train both experts, then the four models on them, and evaluate."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cast import CASTConfig
from cast.demo.clips import CachedClips, Stills
from cast.demo.models import CONFIG, STREAMS, SingleStreams, cast_model, spatial_expert, temporal_expert
from cast.evaluation import average, probabilities
from cast.ground.files import write_json
from cast.metrics import compositional_metrics
from cast.training import Clips, Progress, Recipe, train

#: The compared models, in the order of tables and plots.
MODELS = ("spatial", "temporal", "ensemble", "cast")


def curve_clips(clips: int) -> int:
    """Number of validation clips for a point of the learning curves; the final figures use all `clips`."""
    return min(240, clips // 4)


Probabilities = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """The lengths of all trainings. All four models share `models`."""

    stills: int = 12_000
    spatial: Recipe = field(default_factory=lambda: Recipe(epochs=10, batch_size=32, lr=2e-3, warmup=0.5))
    temporal: Recipe = field(default_factory=lambda: Recipe(epochs=10, batch_size=8, lr=1e-3, warmup=0.5))
    models: Recipe = field(default_factory=lambda: Recipe(epochs=6, batch_size=16, lr=2e-3, warmup=0.5))


@dataclass(frozen=True)
class Data:
    """All data for training and evaluation, in memory."""

    stills: Stills
    plain: CachedClips
    train: CachedClips
    val: CachedClips


@dataclass
class Outcome:
    """One seed's results. Percentages; probabilities are of the validation clips, in their order."""

    seed: int
    metrics: dict[str, dict[str, float]]
    ensembles: dict[str, dict[str, float]]
    curves: dict[str, list[dict[str, float]]]
    seconds: dict[str, float]  # of training steps, by stage
    probabilities: dict[str, Probabilities]
    apart: tuple[int, int]  # number of clips whose action only CAST named right, and only the ensemble


class BothStreams:
    """Clips with every label for both streams, for SingleStreams."""

    def __init__(self, clips: CachedClips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """As CachedClips, every label once for each stream."""
        videos, labels = self.clips.batch(epoch, indices)
        return videos, {f"{stream}_{head}": label for stream in STREAMS for head, label in labels.items()}


#: (name of a stage, its number of steps) -> a function to call after each step.
Reporter = Callable[[str, int], Callable[[Progress, dict[str, float]], None]]


def checkpoint_directory(root: Path, stage: str) -> Path:
    """The directory of a stage's checkpoints in a seed's directory."""
    return root / "checkpoints" / stage.replace(" ", "-")


class Study:
    """Trains and evaluates with one seed; finished stages of an earlier run are read from their checkpoints.

    Args:
        data: clips and pictures.
        directory: receives one directory of checkpoints per stage, and the finished CAST as `cast`.
        seed: of everything but the data.
        budget: lengths of the trainings.
        report: called for every step.
        config: sizes of the models.
    """

    data: Data
    root: Path
    seed: int
    budget: Budget
    report: Reporter
    config: CASTConfig

    def __init__(
        self,
        data: Data,
        directory: str | os.PathLike[str],
        seed: int,
        budget: Budget,
        report: Reporter,
        config: CASTConfig = CONFIG,
    ) -> None:
        self.data, self.root, self.seed, self.budget = data, Path(directory), seed, budget
        self.report, self.config = report, config
        self.curves: dict[str, list[dict[str, float]]] = {}
        self.seconds: dict[str, float] = {}

    def run(self, labels: dict[str, list[str]]) -> Outcome:
        """Run all stages; `labels` are the class names of the finished model."""
        spatial, temporal = self._experts()

        def build(exchange: bool) -> Any:
            return cast_model(self.config, spatial, temporal, self.seed, exchange)

        alone = SingleStreams(self.config, build(exchange=False))
        self._train("alone", alone, BothStreams(self.data.train), self.budget.models, BothStreams(self.data.val))
        ensemble, model = build(exchange=False), build(exchange=True)
        self._train("ensemble", ensemble, self.data.train, self.budget.models, self.data.val)
        self._train("cast", model, self.data.train, self.budget.models, self.data.val)
        self._save(model, labels)
        return self._evaluate(alone, ensemble, model)

    def _experts(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        spatial, temporal = spatial_expert(self.config, self.seed), temporal_expert(self.config, self.seed)
        self._train("spatial expert", spatial, self.data.stills, self.budget.spatial)
        self._train("temporal expert", temporal, self.data.plain, self.budget.temporal)
        return spatial.state_dict(), temporal.state_dict()

    def _train(self, name: str, model: nn.Module, clips: Clips, recipe: Recipe, val: Clips | None = None) -> None:
        recipe = replace(recipe, seed=self.seed)

        def validate(model: nn.Module) -> dict[str, float]:
            if val is None:
                return {}
            answers, truths = probabilities(model, val, limit=curve_clips(len(val)))
            hits = {head: (answers[head].argmax(1) == truth).float().mean().item() for head, truth in truths.items()}
            return {f"val {head}": 100 * share for head, share in hits.items()}

        steps = recipe.epochs * (len(clips) // recipe.batch_size)
        directory = checkpoint_directory(self.root, name)
        show = self.report(name, steps)
        progress = train(model, clips, recipe, directory, show, validate)
        show(progress, {})  # shows a stage that an earlier run had finished
        self.curves[name], self.seconds[name] = progress.history, progress.seconds

    def _save(self, model: Any, labels: dict[str, list[str]]) -> None:
        model.sampling = "uniform"  # the sampling of the demo's clips
        model.save_pretrained(self.root / "cast")
        write_json(self.root / "cast" / "labels.json", labels)

    def _evaluate(self, alone: nn.Module, ensemble: nn.Module, model: nn.Module) -> Outcome:
        single, _ = probabilities(alone, BothStreams(self.data.val))
        two_experts, truths = probabilities(ensemble, self.data.val)
        together, _ = probabilities(model, self.data.val)
        streams = {stream: {head: single[f"{stream}_{head}"] for head in truths} for stream in STREAMS}
        # There are two ways to build an ensemble; the stronger one is the baseline.
        candidates = {
            "noun from spatial, verb from temporal": two_experts,
            "mean of both streams' probabilities": average(list(streams.values())),
        }
        ensembles = {name: compositional_metrics(answers, truths) for name, answers in candidates.items()}
        best = max(ensembles, key=lambda name: ensembles[name]["action"])
        answers = {**streams, "ensemble": candidates[best], "cast": together}
        metrics = {name: compositional_metrics(answers[name], truths) for name in MODELS}
        apart = _only_one_right(answers["cast"], answers["ensemble"], truths)
        return Outcome(self.seed, metrics, ensembles, self.curves, self.seconds, answers, apart)


def _only_one_right(first: Probabilities, second: Probabilities, truths: Probabilities) -> tuple[int, int]:
    """Number of clips whose verb and noun only the first model names right, and only the second."""
    one, two = (
        torch.stack([answers[head].argmax(1) == truth for head, truth in truths.items()]).all(0)
        for answers in (first, second)
    )
    return int((one & ~two).sum()), int((two & ~one).sum())
