"""RandAugment beside the libraries that the recipe comes from: timm for the strengths, Pillow for the pictures."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from timm.data import auto_augment

from cast.video.randaugment import _STRENGTHS, Operation, RandAugment

PUBLISHED = "rand-m7-n4-mstd0.5-inc1"
#: Our operations -> timm's "increasing" ones.
TIMM = {
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


def clip(frames: int = 3, height: int = 40, width: int = 56) -> torch.Tensor:
    """A smooth picture with an edge and a little noise, another one in each frame."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin((x + 3 * t) / 9 + c) * np.cos(y / 7 - c) for t in range(frames) for c in range(3)]
    video = np.stack(waves).reshape(frames, 3, height, width) + rng.normal(0, 3, (frames, 3, height, width))
    video[:, :, :, width // 2 :] -= 20
    return torch.from_numpy(video.clip(0, 255).astype(np.uint8))


def pictures(video: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in video]


def with_pillow(name: str, strength: float, picture: Image.Image) -> Image.Image:
    width, height = picture.size
    warps = {
        "shear_x": (1, strength, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, strength, 1, 0),
        "translate_x": (1, 0, strength * width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, strength * height),
    }
    grey = (128, 128, 128)
    if name in warps:
        size, data = picture.size, warps[name]
        return picture.transform(size, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC, fillcolor=grey)
    if name == "rotate":
        return picture.rotate(strength, Image.Resampling.BICUBIC, fillcolor=grey)
    if name == "solarize_add":
        return picture.point(lambda value: min(255, value + int(strength)) if value < 128 else value)
    if name == "posterize" and not strength:  # Pillow refuses to keep no bit at all; the recipe can ask for it
        return picture.point(lambda value: 0)
    if name in ("posterize", "solarize"):
        return getattr(ImageOps, name)(picture, int(strength))
    if name in ("autocontrast", "equalize", "invert"):
        return getattr(ImageOps, name)(picture)
    return getattr(ImageEnhance, name.capitalize())(picture).enhance(strength)


#: Grey levels by which our pictures may differ from Pillow's: on average, and anywhere but in 1 % of the pixels.
#: Pillow's bicubic kernel is sharper (a = -1) than PyTorch's (-0.75); the others round differently.
ALLOWED = {"warp": (0.6, 4), "other": (1.0, 1), "equalize": (1.0, 3)}


@pytest.mark.parametrize("level", [0.35, 0.7, 1.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", _STRENGTHS)
def test_operations_make_what_pillow_makes(name: str, level: float, sign: float) -> None:
    video, strength = clip(), _STRENGTHS[name](level, sign)
    ours = Operation(name, strength)(video).permute(0, 2, 3, 1).int()
    theirs = torch.from_numpy(np.stack([np.asarray(with_pillow(name, strength, p)) for p in pictures(video)])).int()
    warp = name.startswith(("shear", "translate", "rotate"))
    mean, most = ALLOWED["warp" if warp else name if name in ALLOWED else "other"]
    difference = (ours - theirs).abs().float()
    assert difference.mean() <= mean
    assert difference.flatten().quantile(0.99) <= most


@pytest.mark.parametrize("level", np.linspace(0, 10, 41))
def test_strengths_are_timms(level: float) -> None:
    for ours, theirs in TIMM.items():
        function = auto_augment.LEVEL_TO_ARG[theirs]
        expected = function(float(level), {"translate_pct": 0.45}) if function else ()
        signed = {_STRENGTHS[ours](level / 10, sign) for sign in (1.0, -1.0)}
        if expected:
            near = min(signed, key=lambda value: abs(value - expected[0]))
            assert near == pytest.approx(expected[0], abs=1e-9), ours
        else:
            assert signed == {0.0}


def test_the_operations_are_timms() -> None:
    assert sorted(TIMM.values()) == sorted(auto_augment._RAND_INCREASING_TRANSFORMS)
    assert set(TIMM) == set(_STRENGTHS)


def test_draws_follow_the_recipe() -> None:
    recipe, rng = RandAugment.parse(PUBLISHED), np.random.default_rng(0)
    drawn = [recipe.draw(rng) for _ in range(6000)]
    counts = Counter(map(len, drawn))
    # Four draws, each carried out half of the time: binomial.
    for number, share in enumerate((1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)):
        assert counts[number] / 6000 == pytest.approx(share, abs=0.02)
    operations = [operation for clip_ops in drawn for operation in clip_ops]
    names = Counter(operation.name for operation in operations)
    assert set(names) == set(_STRENGTHS)
    assert all(number / len(operations) == pytest.approx(1 / 15, abs=0.01) for number in names.values())
    assert any(a.name == b.name for ops in drawn for a, b in pairwise(ops))  # with replacement
    turns = np.array([operation.strength for operation in operations if operation.name == "rotate"])
    assert np.mean(turns > 0) == pytest.approx(0.5, abs=0.06)
    assert np.abs(turns).mean() == pytest.approx(21, abs=0.2)
    assert np.abs(turns).std() == pytest.approx(1.5, abs=0.15)


def test_the_papers_nine_with_a_deviation_of_a_half() -> None:
    recipe = RandAugment.parse("rand-m9-mstd0.5-inc1")
    assert recipe == RandAugment(magnitude=9, count=2, deviation=0.5, probability=0.5)
    assert RandAugment.parse(PUBLISHED) == RandAugment(7, 4, 0.5, 0.5)
    rng = np.random.default_rng(1)
    turns = [abs(op.strength) for _ in range(4000) for op in recipe.draw(rng) if op.name == "rotate"]
    assert np.mean(turns) == pytest.approx(27, abs=0.3)
    assert max(turns) <= 30


@pytest.mark.parametrize("name", _STRENGTHS)
def test_a_frame_of_a_clip_is_treated_like_that_frame_alone(name: str) -> None:
    video, operation = clip(), Operation(name, _STRENGTHS[name](0.7, -1.0))
    whole = operation(video)
    assert whole.shape == video.shape
    assert whole.dtype == torch.uint8
    assert not torch.equal(whole, video)
    for index in range(len(video)):
        assert torch.equal(whole[index], operation(video[index : index + 1])[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rand-m7-n4-mstd0.5", "inc1"),
        ("augmix-m7-inc1", "begin with 'rand'"),
        ("rand-m7-inc0", "can't read 'inc0'"),
        ("rand-m70-inc1", "at most 10"),
        ("rand-m7-n1.5-inc1", r"can't read 'n1\.5'"),
        ("rand-m7-w0-inc1", "can't read 'w0'"),
        ("rand-mx-inc1", "can't read 'mx'"),
    ],
)
def test_what_it_does_not_mean_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandAugment.parse(text)
