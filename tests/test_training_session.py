"""What a session makes of a recipe: every number of it arrives where it is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cast.training import Plan, cosine
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
