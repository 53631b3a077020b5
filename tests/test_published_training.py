"""Parameter groups, schedule, recipes, and pre-training beside what the published functions answered."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from published import published
from torch import nn

import cast
from cast.model.config import CASTConfig, make_config
from cast.model.layers import sincos_table
from cast.pretrain.masking import hidden_patches, tube_mask
from cast.pretrain.model import VideoMAE
from cast.training import cosine, layer_scale, parameter_groups
from cast.training.recipes import load_recipe
from cast.training.session import Session
from cast.training.settings import TrainSettings
from cast.video.annotations import Sample

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", ["compositional", "one_head"])
@pytest.mark.parametrize("trains", ["frozen_experts", "all_trainable"])
def test_parameter_groups(kind: str, trains: str) -> None:
    theirs = published()["parameter_groups"][kind]
    with torch.device("meta"):
        model = cast.CAST(heads={"verb": 97, "noun": 300} if kind == "compositional" else {"action": 174})
    parameters = dict(model.named_parameters())
    assert {name: list(p.shape) for name, p in parameters.items()} == dict(
        zip(theirs["names"], theirs["shapes"], strict=True)
    )
    if trains == "all_trainable":
        model.requires_grad_(True)
    for decay, expected in theirs[trains].items():
        groups = parameter_groups(model, 0.05, float(decay))
        ours = {id(p): (group["weight_decay"], group["lr_scale"]) for group in groups for p in group["params"]}
        assert len(groups) == expected["groups"]
        rows = zip(theirs["names"], expected["weight_decay"], expected["lr_scale"], strict=True)
        for name, weight_decay, scale in rows:
            found = ours.get(id(parameters[name]), (None, None))
            assert found == (weight_decay, scale if scale is None else pytest.approx(scale, rel=1e-12)), (name, decay)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("clip_ln_pre.weight", 0.75**13),
        ("stream.expert.ln_pre.bias", 0.75**13),
        ("spatial.expert.cls_token", 0.75**13),  # timm's
        ("spatial.expert.pos_embed", 0.75**13),
        ("spatial.expert.norm_pre.weight", 0.75**13),
        ("time_positional_embedding", 1.0),  # AIM's, which is new
        ("clip_ln_post.weight", 1.0),
    ],
)
def test_what_comes_before_the_first_block_is_slowest(name: str, scale: float) -> None:
    assert layer_scale(name, 12, 0.75) == scale


def test_of_tables_of_positions_clips_own_decays() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("positional_embedding", "time_positional_embedding", "pos_embed", "clip_time_pos"):
                self.register_parameter(name, nn.Parameter(torch.ones(3, 3)))

    tables = Tables()
    decays = {id(p): group["weight_decay"] for group in parameter_groups(tables, 0.05, 1.0) for p in group["params"]}
    assert [name for name, p in tables.named_parameters() if decays[id(p)]] == ["positional_embedding"]


def test_schedule() -> None:
    theirs = published()["schedule"]
    cases = [theirs | recipe for recipe in theirs["recipes"].values()] + theirs["more"]
    assert len(cases) > 5
    for case in cases:
        warmup, steps = case["warmup_epochs"] * case["steps_per_epoch"], case["epochs"] * case["steps_per_epoch"]
        rate = cosine(case["peak"], case["floor"], warmup, steps)
        assert [rate(step) for step in range(steps)] == pytest.approx(case["lr_values"], rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", ["ek100", "ssv2", "k400"])
def test_recipes(name: str) -> None:
    settings, schedule = load_recipe(TrainSettings, name), published()["schedule"]
    optim, theirs = settings.optim, schedule["recipes"][name]
    ours = {
        "base_lr": optim.lr, "base_min_lr": optim.min_lr, "total_batch": optim.total_batch, "peak": optim.peak,
        "floor": optim.floor, "recipe_epochs": optim.epochs, "recipe_warmup_epochs": optim.warmup_epochs,
        "layer_decay": optim.layer_decay, "drop_path": settings.model.drop_path, "weight_decay": optim.weight_decay,
    }  # fmt: skip
    assert ours == {key: value for key, value in theirs.items() if not isinstance(value, list)}
    assert set(theirs["weight_decay_values"]) == {optim.weight_decay}
    assert optim.total_batch % (optim.micro_batch * schedule["gpus"]) == 0


def test_drop_path() -> None:
    theirs = published()["drop_path"]
    for rate, rates in theirs["rates"].items():
        config = make_config("base", drop_path=float(rate), depth=theirs["depth"])
        assert [config.drop_rate(block) for block in range(config.depth)] == pytest.approx(rates, abs=1e-7)


def steps_and_rates(tmp_path: Path, *changes: str) -> tuple[int, float, float]:
    """Steps of an epoch over 25 videos, and the highest and the last rate."""
    chosen = load_recipe(TrainSettings, "digits", f"data.root={tmp_path}", f"out={tmp_path / 'out'}", *changes)
    samples = [Sample(tmp_path / f"{number}.mp4", {"verb": 0, "noun": 0}, number) for number in range(25)]
    for sample in samples:
        sample.path.touch()
    session = Session(chosen, (), False, "")
    plan = session.plan(session.loader(samples), len(samples))
    return plan.steps_per_epoch, chosen.optim.peak, chosen.optim.floor


def test_difference_repeated_augmentation(tmp_path: Path) -> None:
    """Ours counts clips: twice the steps. Twice the batches at half the base rate is the published loop."""
    bare = ("optim.total_batch=8", "optim.micro_batch=4", "optim.lr=1e-3", "optim.min_lr=1e-5")
    doubled = ("optim.total_batch=16", "optim.micro_batch=8", "optim.lr=5e-4", "optim.min_lr=5e-6")
    once = steps_and_rates(tmp_path, *bare)
    assert once[0] == 3
    assert steps_and_rates(tmp_path, *bare, "data.augment.repeats=2") == (6, *once[1:])
    assert steps_and_rates(tmp_path, *doubled, "data.augment.repeats=2") == once


@pytest.mark.parametrize("name", ["ek100", "ssv2", "k400", "ablation"])
def test_a_recipe_says_how_to_repeat_as_published(name: str) -> None:
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    changes = re.findall(r"([a-z_.]+)=([0-9.e-]+)", text.split("repeats: 1")[1].split("\nmodel:")[0])
    assert [key for key, _ in changes] == [
        "data.augment.repeats", "optim.total_batch", "optim.micro_batch", "optim.lr", "optim.min_lr",
    ]  # fmt: skip
    bare = load_recipe(TrainSettings, name)
    twice = load_recipe(TrainSettings, name, *(f"{key}={value}" for key, value in changes))
    assert twice.data.augment.repeats == 2
    assert (twice.optim.total_batch, twice.optim.micro_batch) == (
        2 * bare.optim.total_batch,
        2 * bare.optim.micro_batch,
    )
    assert twice.optim.accumulate(16) == bare.optim.accumulate(16)
    assert (twice.optim.peak, twice.optim.floor) == pytest.approx((bare.optim.peak, bare.optim.floor))


def test_difference_validation() -> None:
    """Theirs draws at random, as in training; ours is one view, always the same (tests/test_video_loader.py)."""
    assert published()["train_indices"]["validation_equals_training"] is True


# --- pre-training


def test_difference_masks() -> None:
    """Counts and tubes are equal; another generator draws the patches; a mask that hides nothing is refused."""
    theirs = published()["videomae"]["masks"]
    for patches, ratio, hidden in theirs["counts"]:
        if hidden:
            assert hidden_patches(patches, ratio) == hidden
        else:
            with pytest.raises(ValueError, match="some must be hidden"):
                hidden_patches(patches, ratio)
    frames, patches = theirs["frames"], theirs["patches"]
    for ratio, by_seed in theirs["hidden"].items():
        ours = tube_mask(2, frames, patches, float(ratio)).hidden.view(2, frames, -1)
        assert {len(set(hidden)) for hidden in by_seed} == {ours.shape[2]}
        assert torch.equal(ours % patches, (ours % patches)[:, :1].expand_as(ours))


def test_positions() -> None:
    for case in published()["videomae"]["positions"]:
        table = sincos_table(case["rows"], case["width"]).double().view(case["rows"], case["width"])
        for row, name in ((0, "first"), (-1, "last")):
            np.testing.assert_allclose(table[row], case[name], atol=1e-6)


def test_initialisation() -> None:
    theirs = published()["videomae"]["init"]
    torch.manual_seed(0)
    ours = dict(VideoMAE(CASTConfig()).named_parameters())
    assert {name: list(p.shape) for name, p in ours.items()} == dict(
        zip(theirs["names"], theirs["shapes"], strict=True)
    )
    for name, std, mean in zip(theirs["names"], theirs["std"], theirs["mean"], strict=True):
        values = ours[name].detach()
        # Of n values a deviation is known to about 1 / sqrt(2n); 2 % is below that for vectors.
        share = 0.02 + 4 / (2 * values.numel()) ** 0.5
        assert float(values.std()) == pytest.approx(std, rel=share, abs=1e-9), name
        assert float(values.mean()) == pytest.approx(mean, abs=max(1e-9, 8 * std / values.numel() ** 0.5)), name
