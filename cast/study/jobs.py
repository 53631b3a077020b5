"""One training of a study: an expert, or a row's model on trained experts. Its result is a directory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cast.baselines import DESIGNS
from cast.demo.dataset import Sizes
from cast.evaluation import average, probabilities
from cast.ground.files import write_json
from cast.metrics import compositional_metrics
from cast.model.config import CASTConfig
from cast.study.data import StudyData
from cast.study.models import EXPERTS, MINIATURE, expert_weights, miniature, needed_experts, small_expert
from cast.study.tables import Model
from cast.training import Recipe, train

RESULT = "result.json"


@dataclass(frozen=True)
class Settings:
    """Data, sizes and training of a study. All rows share `models`, so that they can be compared."""

    sizes: Sizes = field(default_factory=Sizes)
    pictures: int = 12_000
    config: CASTConfig = MINIATURE
    on_pictures: Recipe = field(default_factory=lambda: Recipe(epochs=8, batch_size=32, lr=2e-3, warmup=0.5))
    on_clips: Recipe = field(default_factory=lambda: Recipe(epochs=10, batch_size=8, lr=1e-3, warmup=0.5))
    models: Recipe = field(default_factory=lambda: Recipe(epochs=4, batch_size=16, lr=2e-3, warmup=0.5))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"config": self.config.to_dict()}


@dataclass(frozen=True)
class Job:
    """A training: of an expert by name, or of a model of the plan."""

    name: str
    seed: int
    model: Model | None = None

    def directory(self, out: Path) -> Path:
        kind = "experts" if self.model is None else "models"
        return out / f"seed-{self.seed}" / kind / self.name.replace(":", "-")

    def identity(self, settings: Settings) -> str:
        """A hash of everything that influences the result."""
        # The number rises when training itself changes. It is 2 since CLIP's table of positions decays, as published.
        what = {"training": 2, "settings": settings.to_dict(), "seed": self.seed, "name": self.name}
        if self.model is not None:
            # Without `open` and `miniature`: these notes about a row do not influence the result.
            what["model"] = asdict(replace(self.model, open="", miniature=""))
            what["design"] = asdict(DESIGNS[self.model.design])
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=list).encode()).hexdigest()[:16]


def finished(job: Job, out: Path, settings: Settings) -> dict[str, Any] | None:
    """The result of an earlier run, or None.

    Raises:
        ValueError: the directory has a result with other settings.
    """
    path = job.directory(out) / RESULT
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    if result["identity"] != job.identity(settings):
        raise ValueError(f"{path} was made with other settings or another model: choose another directory with --out")
    return result


def run_job(job: Job, out: Path, settings: Settings, data: Path) -> dict[str, Any]:
    """Train on one thread, evaluate, and write the result; a killed job continues from its last checkpoint.

    Returns:
        `identity`, `seconds` of training, `history` by epoch, and for a model `metrics` (percent) and `parameters`.
    """
    if (done := finished(job, out, settings)) is not None:
        return done
    with _one_thread():
        result = (
            _train_expert(job, out, settings, data) if job.model is None else _train_model(job, out, settings, data)
        )
    result = {"identity": job.identity(settings), "name": job.name, "seed": job.seed} | result
    write_json(job.directory(out) / RESULT, result)
    shutil.rmtree(job.directory(out) / "checkpoints", ignore_errors=True)
    return result


def _train_expert(job: Job, out: Path, settings: Settings, data: Path) -> dict[str, Any]:
    source, label = EXPERTS[job.name]
    clips = StudyData(data).pictures(label) if source == "pictures" else StudyData(data).clips("plain")
    recipe = settings.on_pictures if source == "pictures" else settings.on_clips
    expert = small_expert(job.name, job.seed, settings.config)
    directory = job.directory(out)
    progress = train(expert, clips, replace(recipe, seed=job.seed), directory / "checkpoints")
    save_file(expert_weights(job.name, expert), directory / "weights.safetensors")
    return {"seconds": progress.seconds, "history": progress.history}


def _train_model(job: Job, out: Path, settings: Settings, data: Path) -> dict[str, Any]:
    assert job.model is not None
    experts: dict[str, Mapping[str, Tensor]] = {
        name: load_file(Job(name, job.seed).directory(out) / "weights.safetensors")
        for name in needed_experts(job.model)
    }
    model = miniature(job.model, experts, job.seed, settings.config)
    stored, directory = StudyData(data), job.directory(out)
    recipe = replace(settings.models, seed=job.seed)
    progress = train(model, stored.clips("train"), recipe, directory / "checkpoints")
    answers, truths = probabilities(model, stored.clips("val"))
    save_file(answers, directory / "probabilities.safetensors")
    return {
        "seconds": progress.seconds,
        "history": progress.history,
        "metrics": compositional_metrics(answers, truths),
        "parameters": {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "total": sum(p.numel() for p in model.parameters()),
        },
    }


def ensemble_metrics(members: list[Job], out: Path, data: Path) -> dict[str, float]:
    """Accuracies in percent of the mean of the members' probabilities."""
    labels = StudyData(data).clips("val").labels
    answers = [load_file(job.directory(out) / "probabilities.safetensors") for job in members]
    return compositional_metrics(average(answers), labels)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: two jobs on two cores are faster than two threads, and threads change the rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
