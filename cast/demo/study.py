"""One seed of the demo's experiment: train both experts, then the four models on top of them, and evaluate."""

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

#: What is compared, in the order of tables and plots.
MODELS = ("spatial", "temporal", "ensemble", "cast")


def curve_clips(clips: int) -> int:
    """Validation clips of so many that are behind a point of the learning curves; the final figures take all."""
    return min(240, clips // 4)


Probabilities = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """How long everything trains. `models` is the same for all four models."""

    stills: int = 12_000
    spatial: Recipe = field(default_factory=lambda: Recipe(epochs=10, batch_size=32, lr=2e-3, warmup=0.5))
    temporal: Recipe = field(default_factory=lambda: Recipe(epochs=10, batch_size=8, lr=1e-3, warmup=0.5))
    models: Recipe = field(default_factory=lambda: Recipe(epochs=6, batch_size=16, lr=2e-3, warmup=0.5))


@dataclass(frozen=True)
class Data:
    """Everything that is trained and evaluated on, in memory."""

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
    apart: tuple[int, int]  # clips whose action CAST alone named, and the ensemble alone


class BothStreams:
    """Clips whose labels are asked of either stream, as SingleStreams answers them."""

    def __init__(self, clips: CachedClips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """As CachedClips, every label once for each stream."""
        videos, labels = self.clips.batch(epoch, indices)
        return videos, {f"{stream}_{head}": label for stream in STREAMS for head, label in labels.items()}


#: Given a stage's name and its number of steps, makes what is called after each of them.
Reporter = Callable[[str, int], Callable[[Progress, dict[str, float]], None]]


def checkpoint_directory(root: Path, stage: str) -> Path:
    """Where a seed's directory keeps the checkpoints of a stage."""
    return root / "checkpoints" / stage.replace(" ", "-")


class Study:
    """Trains and evaluates with one seed; stages that a former run finished are read from their checkpoints.

    Args:
        data: clips and pictures.
        directory: receives one directory of checkpoints per stage, and the finished CAST as `cast`.
        seed: of everything but the data.
        budget: how long to train.
        report: told of every step.
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
        """All stages; `labels` are the class names that go with the finished model."""
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
        show(progress, {})  # nothing was shown if it was finished before
        self.curves[name], self.seconds[name] = progress.history, progress.seconds

    def _save(self, model: Any, labels: dict[str, list[str]]) -> None:
        model.sampling = "uniform"  # as the demo's clips are read
        model.save_pretrained(self.root / "cast")
        write_json(self.root / "cast" / "labels.json", labels)

    def _evaluate(self, alone: nn.Module, ensemble: nn.Module, model: nn.Module) -> Outcome:
        single, _ = probabilities(alone, BothStreams(self.data.val))
        two_experts, truths = probabilities(ensemble, self.data.val)
        together, _ = probabilities(model, self.data.val)
        streams = {stream: {head: single[f"{stream}_{head}"] for head in truths} for stream in STREAMS}
        # Two ways to build an ensemble; the stronger one is the baseline.
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
    """Clips whose verb and noun the first model names and the second does not, and the other way round."""
    one, two = (
        torch.stack([answers[head].argmax(1) == truth for head, truth in truths.items()]).all(0)
        for answers in (first, second)
    )
    return int((one & ~two).sum()), int((two & ~one).sum())
