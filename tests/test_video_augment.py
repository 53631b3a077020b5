"""Augmentation of whole clips: torchvision's transforms as the oracle, and one set of parameters for all frames."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from cast.video.augment import AugmentPlan, AugmentSettings, _multiscale, apply, draw
from cast.video.transforms import MEAN, STD

SIZE = 32
EVERYTHING = AugmentSettings(
    flip=0.5, randaugment="rand-m7-n4-mstd0.5-inc1", color_jitter=0.4, erasing=0.5, scale=(0.3, 1.0)
)


def video(frames: int = 4, height: int = 60, width: int = 80) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


def plan(settings: AugmentSettings, seed: int, height: int = 60, width: int = 80) -> AugmentPlan:
    return draw(settings, SIZE, height, width, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(8))
def test_crop_and_flip_are_torchvisions_on_the_normalised_clip(seed: int) -> None:
    drawn = plan(AugmentSettings(flip=0.5), seed)
    clip = apply(drawn, video(), SIZE)
    steps = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    expected = v2.functional.resized_crop(steps(video()), *drawn.crop, [SIZE, SIZE], antialias=False)
    expected = v2.functional.horizontal_flip(expected) if drawn.flip else expected
    assert clip.shape == (3, 4, SIZE, SIZE)
    assert clip.is_contiguous()
    assert torch.equal(clip.transpose(0, 1), expected)


def test_crops_are_distributed_as_torchvisions() -> None:
    """Area, aspect and place of 500 crops against torchvision's own: two-sample Kolmogorov-Smirnov distance."""
    settings = AugmentSettings()
    transform = v2.RandomResizedCrop(SIZE, settings.scale, settings.ratio)
    torch.manual_seed(0)
    theirs = [transform.make_params([video(1)]) for _ in range(500)]
    ours = [plan(settings, seed).crop for seed in range(500)]
    for mine, other in (
        ([h * w for _, _, h, w in ours], [p["height"] * p["width"] for p in theirs]),
        ([w / h for _, _, h, w in ours], [p["width"] / p["height"] for p in theirs]),
        ([t for t, *_ in ours], [p["top"] for p in theirs]),
    ):
        grid = np.sort(np.concatenate([mine, other]))
        steps = [np.searchsorted(np.sort(values), grid, side="right") / 500 for values in (mine, other)]
        assert np.abs(steps[0] - steps[1]).max() < 0.103  # 1.63 sqrt(2 / 500), the 1 % level


@pytest.mark.parametrize("seed", range(12))
def test_every_frame_gets_the_same_parameters(seed: int) -> None:
    """A frame of the clip is what that frame alone would become, and a still video stays still."""
    drawn = dataclasses.replace(plan(EVERYTHING, seed), erase=None)
    whole = apply(drawn, video(), SIZE)
    for index in range(4):
        assert torch.equal(whole[:, index : index + 1], apply(drawn, video()[index : index + 1], SIZE))
    still = apply(drawn, video()[:1].expand(4, -1, -1, -1).contiguous(), SIZE)
    assert (still == still[:, :1]).all()


def test_a_plan_is_a_function_of_the_generator_and_leaves_pytorchs_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = [plan(EVERYTHING, seed) for seed in range(20)]
    assert torch.equal(torch.rand(2), expected)
    assert first == [plan(EVERYTHING, seed) for seed in range(20)]
    assert len({repr(one) for one in first}) == 20
    listed = dataclasses.replace(EVERYTHING, scale=[0.3, 1.0])  # as YAML writes it
    assert plan(listed, 3) == first[3]


@pytest.mark.parametrize(("chance", "low", "high"), [(0.0, 0, 0), (0.5, 75, 125), (1.0, 200, 200)])
def test_probabilities_are_kept(chance: float, low: int, high: int) -> None:
    drawn = [plan(AugmentSettings(flip=chance, erasing=chance), seed) for seed in range(200)]
    assert low <= sum(one.flip for one in drawn) <= high
    assert low <= sum(one.erase is not None for one in drawn) <= high


def test_erasing_fills_one_box_in_every_frame_with_noise() -> None:
    drawn = plan(AugmentSettings(erasing=1.0), 1)
    assert drawn.erase is not None
    top, left, height, width = drawn.erase
    assert 0.02 * 0.7 <= height * width / SIZE**2 <= 1 / 3 * 1.3
    clip, bare = apply(drawn, video(), SIZE), apply(dataclasses.replace(drawn, erase=None), video(), SIZE)
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert torch.equal(clip[..., ~inside], bare[..., ~inside])
    noise = clip[..., inside]
    assert not torch.equal(noise[:, 0], noise[:, 1])
    assert abs(float(noise.mean())) < 0.2
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    assert torch.equal(clip, apply(drawn, video(), SIZE))


def test_jitter_stays_within_its_bounds_and_takes_all_orders() -> None:
    drawn = [plan(AugmentSettings(color_jitter=0.4), seed).jitter for seed in range(200)]
    factors = np.array([factor for jitter in drawn for _, factor in jitter])
    assert 0.6 <= factors.min() < 0.65
    assert 1.35 < factors.max() <= 1.4
    assert len({tuple(name for name, _ in jitter) for jitter in drawn}) == 6
    jitter = drawn[0]
    expected = video()
    for name, factor in jitter:
        expected = getattr(v2.functional, f"adjust_{name}")(expected, factor)
    whole = AugmentPlan(crop=(0, 0, 60, 80), jitter=jitter)
    assert torch.equal(apply(whole, video(), SIZE), apply(AugmentPlan(crop=(0, 0, 60, 80)), expected, SIZE))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"flip": 1.5}, "flip is 1.5; it must be from 0 to 1"),
        ({"scale": (0.5, 0.1)}, "scale is .* must ascend"),
        ({"scale": (0.5, 2.0)}, "at most 1"),
        ({"mixup": -1.0}, "mixup is -1.0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"on": "gpu"}, "on is 'gpu'; it must be 'cpu' or 'device'"),
        ({"randaugment": "rand"}, "inc1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentSettings(**wrong)


def test_multiscale_crops_lie_on_the_published_grid() -> None:
    shares = (1.0, 0.875, 0.75, 0.66)
    rng = np.random.default_rng(0)
    boxes = {_multiscale(shares, 224, 256, 320, rng) for _ in range(4000)}
    assert draw(AugmentSettings(multiscale=shares), 224, 256, 320, rng).crop in boxes
    sides = [256, 224, 192, 168]
    for top, left, height, width in boxes:
        assert abs(sides.index(height) - sides.index(width)) <= 1
        assert top % max((256 - height) // 4, 1) == left % max((320 - width) // 4, 1) == 0
        assert top + height <= 256
        assert left + width <= 320
    assert {(h, w) for _, _, h, w in boxes} == {
        (a, b) for i, a in enumerate(sides) for b in sides[max(i - 1, 0) : i + 2]
    }
    assert len({box[:2] for box in boxes if box[2:] == (192, 192)}) == 13
    with pytest.raises(ValueError, match="multiscale is"):
        AugmentSettings(multiscale=(1.5,))
