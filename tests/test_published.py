"""Everything that the published functions answered beside ours, and every deliberate difference beside its document.

`DIFFERENCES` is the whole list of what is not equal. `docs/reproduce.md` has a row for each, with the reason and what
to set; each has a test of what both sides do, called test_difference_..., here or in `test_published_training.py`. All
other tests here, there and in `test_published_results.py` demand equality.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import PythonsOwn, Scripted, published

from cast.video import randaugment
from cast.video.augment import AugmentSettings, _erased, _multiscale, draw
from cast.video.randaugment import RandAugment
from cast.video.sampling import stride_indices, train_indices, view_indices
from cast.video.transforms import view_transform

ROOT = Path(__file__).parents[1]

#: Names of the rows of docs/reproduce.md's table.
DIFFERENCES = (
    "short videos in training, uniform",
    "one temporal view, uniform",
    "one temporal view, dense",
    "one crop in the test",
    "validation during training",
    "repeated augmentation",
    "masks of pre-training",
)

SAMPLINGS = [(sampling, frames) for sampling in ("uniform", "dense") for frames in (8, 16, 32)]


def lengths(section: dict[str, Any], frames: int) -> range:
    first, last = section["lengths"][str(frames)]
    return range(first, last + 1)


def test_the_document_lists_every_difference() -> None:
    text = (ROOT / "docs/reproduce.md").read_text().split("## Where ours differs from the published code")[1]
    rows = [line.split("|") for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == list(DIFFERENCES)
    assert all(len(row) == 7 and all(cell.strip() for cell in row[1:-1]) for row in rows)  # the reason, what to set


# --- frames


@pytest.mark.parametrize(("sampling", "frames"), SAMPLINGS)
def test_views_of_the_test(sampling: str, frames: int) -> None:
    section = published()["test_indices"]
    views = section["views"][sampling]
    for length, theirs in zip(lengths(section, frames), section[f"{sampling}_{frames}"], strict=True):
        ours = [view_indices(length, view, views, sampling, frames).tolist() for view in range(views)]
        assert ours == theirs, length


@pytest.mark.parametrize(("sampling", "frames"), SAMPLINGS)
def test_training_clips(sampling: str, frames: int) -> None:
    section = published()["train_indices"]
    theirs = section[f"{sampling}_{frames}"]
    counts = theirs["starts" if sampling == "dense" else "choices"]
    for length, first, count in zip(lengths(section, frames), theirs["first"], counts, strict=True):
        if sampling == "uniform" and length < frames:
            assert first == [0] * frames
            continue  # see the difference below
        rng = Scripted()
        assert train_indices(length, rng, sampling, frames).tolist() == first, length
        assert (rng.choices or [1]) == [count], length
        if rng.choices:
            last = train_indices(length, Scripted(count - 1), sampling, frames)
            assert (last - first).tolist() == [count - 1] * frames


def test_difference_short_videos_in_training() -> None:
    """Theirs is frame 0 sixteen times, which the test above asserts."""
    rng = np.random.default_rng(0)
    for length in range(1, 16):
        for _ in range(20):
            ours = train_indices(length, rng, "uniform", 16)
            even = np.arange(17) * length / 16  # the clip in sixteen equal parts
            assert (np.floor(even[:-1]) <= ours).all()
            assert (ours <= even[1:]).all()


@pytest.mark.parametrize("frames", [8, 16, 32])
def test_difference_one_uniform_view(frames: int) -> None:
    section = published()["test_indices"]
    for length, theirs in zip(lengths(section, frames), section["one_view"][f"uniform_{frames}"], strict=True):
        assert view_indices(length, 0, 2, "uniform", frames).tolist() == theirs, "the way to get theirs"
        ours = view_indices(length, 0, 1, "uniform", frames)
        assert ours.tolist() == view_indices(length, 1, 2, "uniform", frames).tolist()


def test_difference_one_dense_view() -> None:
    assert published()["test_indices"]["one_view_dense"] is None
    assert view_indices(300, 0, 1, "dense").tolist() == view_indices(300, 2, 5, "dense").tolist()


def test_pre_training_clips() -> None:
    theirs = published()["videomae"]["train_indices"]
    first, last = theirs["lengths"]
    for length, indices, starts in zip(range(first, last + 1), theirs["first"], theirs["starts"], strict=True):
        rng = Scripted()
        assert stride_indices(length, rng).tolist() == indices, length
        assert (rng.choices or [1]) == [starts], length
    np.testing.assert_array_equal(stride_indices(99, Scripted(5), frames=4, stride=2), [5, 7, 9, 11])
    for length in (9, 99):
        ours, other = (f(length, np.random.default_rng(3), "uniform", 16) for f in (stride_indices, train_indices))
        np.testing.assert_array_equal(ours, other)


# --- pictures


def corner(height: int, width: int, crop: int, crops: int) -> list[int]:
    """Where a view's crop lies, read off a picture whose pixels are their coordinates."""
    cut = view_transform(224, crop, crops, normalise=False).transforms[1]
    pixels = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return cut(torch.stack(pixels))[:, 0, 0].tolist()


@pytest.mark.parametrize("case", range(25))
def test_crops_of_the_test(case: int) -> None:
    section = published()["spatial"]["cases"]
    assert len(section) == 25
    theirs = section[case]
    small = view_transform(224, normalise=False).transforms[0](torch.zeros(1, 3, *theirs["size"], dtype=torch.uint8))
    assert list(small.shape[-2:]) == theirs["resized"]
    assert [corner(*theirs["resized"], crop, 3) for crop in range(3)] == theirs["test"]
    assert corner(*theirs["resized"], 0, 1) == theirs["validation"]


@pytest.mark.parametrize("case", range(25))
def test_difference_one_crop(case: int) -> None:
    """Theirs is the first of three; ours is where their validation looks."""
    theirs = published()["spatial"]["cases"][case]
    assert corner(*theirs["resized"], 0, 3) == theirs["test"][0] == [0, 0], "the way to get theirs"
    assert corner(*theirs["resized"], 0, 1) == theirs["validation"]


def test_random_erasing() -> None:
    theirs = published()["random_erasing"]
    for seed, box in zip(theirs["seeds"], theirs["boxes"], strict=True):
        rng = PythonsOwn(seed)
        rng.random()  # whether to erase at all
        assert list(_erased(theirs["side"], rng)) == box, seed

    class Largest:
        """Tall boxes that fit nowhere."""

        def __init__(self) -> None:
            self.asked: list[tuple[float, float]] = []

        def uniform(self, low: float, high: float) -> float:
            self.asked.append((low, high))
            return high

    largest = Largest()
    assert _erased(theirs["side"], largest) is None
    assert len(largest.asked) == 2 * theirs["attempts"]
    area, aspect = largest.asked[:2]
    assert area == pytest.approx((theirs["min_area"], theirs["max_area"]))
    assert aspect == pytest.approx(theirs["log_aspect"])


def test_multiscale_crops() -> None:
    theirs = published()["videomae"]["multiscale"]
    size, shares = theirs["size"], tuple(theirs["scales"])
    for case in theirs["cases"]:
        picture = size, case["height"], case["width"]
        counts = Scripted()
        _multiscale(shares, *picture, counts)
        pairs, places = counts.choices
        boxes = Counter(
            _multiscale(shares, *picture, Scripted(pair, place)) for pair in range(pairs) for place in range(places)
        )
        assert pairs * places == case["draws"]
        assert boxes == {tuple(box[:4]): box[4] for box in case["boxes"]}, picture


@pytest.mark.parametrize("height", [221, 222, 223, 224, 225, 226, 227])
def test_multiscale_sides_snap_within_two_pixels(height: int) -> None:
    drawn = draw(AugmentSettings(multiscale=(1.0,)), 224, height, 300, np.random.default_rng(0)).crop
    assert drawn[2:] == ((224, 224) if 222 <= height <= 226 else (height, height))
    assert drawn[0] + drawn[2] <= max(height, 224)


#: timm's names of RandAugment's operations.
OPERATIONS = {
    "AutoContrast": "autocontrast", "Equalize": "equalize", "Invert": "invert", "Rotate": "rotate",
    "PosterizeIncreasing": "posterize", "SolarizeIncreasing": "solarize", "SolarizeAdd": "solarize_add",
    "ColorIncreasing": "color", "ContrastIncreasing": "contrast", "BrightnessIncreasing": "brightness",
    "SharpnessIncreasing": "sharpness", "ShearX": "shear_x", "ShearY": "shear_y", "TranslateXRel": "translate_x",
    "TranslateYRel": "translate_y",
}  # fmt: skip


def test_randaugment() -> None:
    theirs = published()["randaugment"]
    strengths, grey = randaugment._STRENGTHS, randaugment._GREY
    assert theirs["operations"].keys() == OPERATIONS.keys()
    assert sorted(OPERATIONS.values()) == sorted(strengths)
    for name, arguments in theirs["operations"].items():
        for sign, values in (arguments or {}).items():
            ours = [strengths[OPERATIONS[name]](m / 10, {"plus": 1.0, "minus": -1.0}[sign]) for m in range(11)]
            assert ours == pytest.approx(values, abs=1e-12), (name, sign)
    assert theirs["fill"] == [grey] * 3
    for case in theirs["parsed"]:
        ours = RandAugment.parse(case["text"])
        assert len(strengths) == case["operations"]
        assert vars(ours) == {name: case[name] for name in ("magnitude", "count", "deviation", "probability")}


def test_every_section_is_compared() -> None:
    """Whatever the file holds is asked for by a test of this module or of the two beside it."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_published*.py"))
    sections = published().keys() - {"sources"} | published()["videomae"].keys()
    assert not [name for name in sections if f'["{name}"]' not in text]
