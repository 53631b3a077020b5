"""What a session makes of a recipe: every number of it arrives where it is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_cases import PointNet, PointSource, planned

from cast.pretrain import PretrainSettings
from cast.pretrain.command import _FREE as PRETRAIN_FREE
from cast.training import Checkpoints, Engine, Plan, cosine
from cast.training.command import FREE as TRAIN_FREE
from cast.training.determinism import NondeterministicError
from cast.training.identity import lasting
from cast.training.recipes import load_recipe
from cast.training.session import Session
from cast.training.settings import TrainSettings
from cast.video.annotations import Sample


def test_every_setting_of_a_recipe_reaches_the_loop(tmp_path: Path) -> None:
    chosen = load_recipe(
        TrainSettings, "digits", f"data.root={tmp_path}", f"out={tmp_path / 'out'}", "optim.epochs=2",
        "optim.total_batch=8", "optim.micro_batch=4", "optim.weight_decay=0.2", "optim.layer_decay=0.7",
        "optim.clip_grad=0.3", "optim.ema=0.5", "optim.betas=[0.8,0.95]", "optim.lr=0.5", "optim.min_lr=0.1",
        "optim.warmup_epochs=1", "seed=5", "checkpoint.every=7", "checkpoint.keep=3", "checkpoint.weights=full",
    )  # fmt: skip
    samples = [Sample(tmp_path / f"{number}.mp4", {"verb": 0, "noun": 0}, number) for number in range(25)]
    for sample in samples:
        sample.path.touch()
    session = Session(chosen, (), False, "")
    plan = session.plan(session.loader(samples), len(samples), 0.1)
    assert plan == Plan(
        epochs=2,
        steps_per_epoch=3,
        accumulate=2,
        micro_batch=4,
        rate=plan.rate,
        weight_decay=0.2,
        layer_decay=0.7,
        smoothing=0.1,
        clip_grad=0.3,
        ema=0.5,
        betas=(0.8, 0.95),
        seed=5,
        checkpoint_every=7,
    )
    rate = cosine(chosen.optim.peak, chosen.optim.floor, 3, 6)
    assert [plan.rate(step) for step in range(6)] == [rate(step) for step in range(6)]
    checkpoints = session.checkpoints(torch.nn.Linear(2, 2), samples)
    assert (checkpoints.keep, checkpoints.weights) == (3, "full")


class Expert(nn.Module):
    """Names of CLIP's, before the blocks; `trains` are those that train."""

    def __init__(self, *trains: str) -> None:
        super().__init__()
        self.head, self.ln_pre = nn.Linear(2, 2), nn.LayerNorm(2)
        self.positional_embedding = nn.Parameter(torch.ones(2, 2))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in ("head", *trains))


@pytest.mark.parametrize(
    ("trains", "changes", "rules"),
    [
        ((), (), None),
        (("positional_embedding",), ("optim.weight_decay=0",), None),
        (("positional_embedding",), (), ["groups"]),
        (("ln_pre",), (), None),  # no layer decay
        (("ln_pre",), ("optim.layer_decay=0.75",), ["groups"]),
        ((), ("data.sampling=dense",), ["dense"]),
        ((), ("data.augment.erasing=0.25",), ["erasing"]),
        ((), ("data.augment.multiscale=[1.0]", "data.sampling=dense"), ["dense", "multiscale"]),
    ],
)
def test_a_training_is_marked_by_the_rules_that_changed_and_that_it_goes_by(
    tmp_path: Path, trains: tuple[str, ...], changes: tuple[str, ...], rules: list[str] | None
) -> None:
    """Others go on from checkpoints of before, which have no mark."""
    chosen = load_recipe(TrainSettings, "digits", f"data.root={tmp_path}", f"out={tmp_path / 'out'}", *changes)
    checkpoints = Session(chosen, (), False, "").checkpoints(Expert(*trains), [Sample(tmp_path / "a.mp4", {"verb": 0})])
    assert checkpoints.identity.get("rules") == rules


def deterministic_session(out: Path, monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> tuple[Session, Engine]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    chosen = load_recipe(
        TrainSettings, "digits", f"data.root={out}", f"out={out}", "run.deterministic=true", "run.precision=fp32"
    )
    session = Session(chosen, (), False, "")
    checkpoints = Checkpoints(out / "checkpoints", session.accelerator, {"samples": 0}, model)
    plan = planned(micro_batch=8, epochs=1)
    session.accelerator.gradient_accumulation_steps = 1
    return session, Engine(model, PointSource(8), plan, session.accelerator, checkpoints)


def test_a_deterministic_training_asks_pytorch_for_it_and_gives_the_switches_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, running = deterministic_session(tmp_path, monkeypatch, PointNet())
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []

    def look(*_: object) -> None:
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        seen.append((torch.are_deterministic_algorithms_enabled(), warns, torch.backends.cudnn.benchmark))

    running.optimizer.optimizer.register_step_pre_hook(look)
    session.run(running, "", lambda model, epoch: {}, lambda: "")
    assert seen == [(True, False, False)] * 6
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


def test_an_operator_that_is_not_deterministic_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(PointNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
            return super().forward(x)

    session, running = deterministic_session(tmp_path, monkeypatch, Net())
    with pytest.raises(NondeterministicError, match=r"put_ does not have .* run\.deterministic=false trains without"):
        session.run(running, "", lambda model, epoch: {}, lambda: "")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("attention", ["flash-attn", "xformers"])
def test_packages_whose_attention_adds_in_any_order_are_refused(attention: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"run.attention={attention} adds in a varying order; choose auto"):
        load_recipe(
            TrainSettings, "digits", f"data.root={tmp_path}", "run.deterministic=true", f"run.attention={attention}"
        )


def test_checkpoints_from_before_graphs_and_deterministic_are_gone_on_from() -> None:
    """A setting that a checkpoint does not know would count as another training."""
    for settings, free in ((TrainSettings, TRAIN_FREE), (PretrainSettings, PRETRAIN_FREE)):
        known = lasting(load_recipe(settings, "digits" if settings is TrainSettings else "videomae-digits"), free)
        assert not {"graphs", "deterministic"} & known["run"].keys()
