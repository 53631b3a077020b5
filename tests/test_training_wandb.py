"""Weights & Biases: a training has a run of its own, and goes on in it when it is resumed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType
from rich.console import Console

from cast.training import Progress, Step
from cast.training.distributed import make_accelerator
from cast.training.log import WANDB_ID, Log


def train(directory: Path, start: int) -> None:
    """Three steps after `start`."""
    directory.mkdir(exist_ok=True)
    accelerator = make_accelerator(trackers=["wandb"], directory=str(directory))
    log = Log(directory, accelerator, 10, {"optim": {"lr": 0.1}}, bars=False, console=Console(quiet=True))
    log.start(Progress(step=start), "")
    for number in range(start + 1, start + 4):
        log.step(Progress(step=number), Step({"loss": 1.0 / number}, 1e-3, 0.5, 8, 0.5, False))
    log.end()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What stands for wandb: it remembers what it was told."""
    seen = SimpleNamespace(runs=[], points=[], finished=0)

    def finish() -> None:
        seen.finished += 1

    def init(**options: Any) -> SimpleNamespace:
        seen.runs.append(options)
        log: Callable[..., None] = lambda values, step, **rest: seen.points.append((step, values))  # noqa: E731
        return SimpleNamespace(log=log, finish=finish)

    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init, module.config = init, {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB])
    return seen


def test_a_resumed_training_goes_on_in_its_run(tmp_path: Path, fake: SimpleNamespace) -> None:
    train(tmp_path / "ek100", 0)
    train(tmp_path / "ek100", 3)
    train(tmp_path / "ssv2", 0)
    train(tmp_path / "ek100", 0)  # anew
    first, resumed, other, anew = fake.runs
    assert first["project"] == "cast"
    assert (first["dir"], first["name"], first["resume"]) == (str(tmp_path / "ek100"), "ek100", "allow")
    assert resumed == first
    assert other["name"] == "ssv2"
    assert len({run["id"] for run in (first, other, anew)}) == 3
    assert (tmp_path / "ek100" / WANDB_ID).read_text().strip() == anew["id"]
    assert [step for step, _ in fake.points[:6]] == [1, 2, 3, 4, 5, 6]
    assert fake.points[0][1]["train/loss"] == 1.0
    assert fake.finished == 4


def test_a_refusal_says_what_to_do(tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})

    def refuse(**options: Any) -> None:
        raise refusal("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ValueError, match=r"No API key configured\. .*WANDB_MODE=offline, or leave wandb out"):
        train(tmp_path / "ek100", 0)


def test_the_real_thing_writes_into_the_trainings_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path / "ek100", 0)
    train(tmp_path / "ek100", 3)
    name = (tmp_path / "ek100" / WANDB_ID).read_text().strip()
    assert len(list((tmp_path / "ek100" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))) >= 1
