"""Augmentation of whole clips: random decisions once per clip, applied to all of its frames.

Drawing and applying are separate. An `AugmentPlan` has all random decisions about one clip. It is drawn on the CPU and
depends only on the generator. `apply` executes it on the clip's device. So all frames of a clip get the same
parameters, and the training device computes the same augmentation as the loader's processes.

The order is the published code's: RandAugment on the stored frames, normalisation, random resized crop (bilinear,
without antialiasing), flip, erasing. The published code accepts colour jitter and ignores it; here it comes first. The
crop is cut out before normalisation and resized afterwards. The numbers are the same, because resizing reads no pixel
outside the crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cast.ground.renamed import renamed
from cast.video.randaugment import Operation, RandAugment
from cast.video.transforms import MEAN, STD

Box = tuple[int, int, int, int]

#: Random erasing as in the published code: share of the area, logarithm of height / width, number of tries.
_ERASED_AREA, _ERASED_ASPECT, _ERASING_TRIES = (0.02, 1 / 3), (math.log(0.3), -math.log(0.3)), 100
#: A side of a multi-scale crop that differs from the target by fewer pixels becomes the target.
_SNAP = 3


@dataclass(frozen=True)
class AugmentSettings:
    """Settings of random changes to training clips.

    Args:
        scale: smallest and largest share of the picture's area that a crop takes.
        ratio: smallest and largest width over height of a crop.
        multiscale: VideoMAE's crop for pre-training instead of `scale` and `ratio`. Width and height are neighbours in
            this list of shares of the shorter side (`size` itself if nearer than 3 pixels), at one of 13 fixed places.
            Empty for random resized crops.
        flip: probability of mirroring left and right. Off by default: do not mirror Something-Something V2, nor any
            videos whose labels name a direction.
        randaugment: in timm's notation, such as "rand-m7-n4-mstd0.5-inc1" (published code) or
            "rand-m9-mstd0.5-inc1" (the paper's "(9, 0.5)"); null for none.
        color_jitter: brightness, contrast and saturation change by a factor from 1 - x to 1 + x (paper: 0.4;
            published code: none).
        erasing: probability of replacing a rectangle by noise: 2 % to a third of the clip's area, height over width
            0.3 to 1 / 0.3.
        mixup: alpha of mixup's Beta distribution; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        mix_probability: share of the batches that are mixed.
        mix_switch: share of the mixed batches that get CutMix, if both are on.
        mix_mode: "batch" draws once per batch, "elem" once per clip.
        smoothing: of the labels, in mixed and unmixed batches.
        repeats: clips made of one decoded video, next to each other in the batch (repeated augmentation). Batches count
            clips, so an epoch has that many times the steps. In the published loop a step has that many times the clips
            instead, see docs/training.md.
        on: place of augmentation: the loader's processes ("cpu"), or the training device ("device"), by `Batch.to`.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    multiscale: tuple[float, ...] = ()
    flip: float = 0.0
    randaugment: str | None = None
    color_jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    mix_switch: float = 0.5
    mix_mode: Literal["batch", "elem"] = "batch"
    smoothing: float = 0.0
    repeats: int = 1
    on: Literal["cpu", "device"] = "cpu"

    def __post_init__(self) -> None:
        for name in ("flip", "erasing", "mix_probability", "mix_switch", "smoothing", "color_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (none) or a positive alpha")
        for name, highest in (("scale", 1.0), ("ratio", float("inf"))):
            low, high = getattr(self, name)
            object.__setattr__(self, name, (low, high))  # a list cannot be hashed, and `_transforms` caches by settings
            if not 0 < low <= high <= highest:
                raise ValueError(f"{name} is {(low, high)}; it must ascend, above 0 and at most {highest}")
        object.__setattr__(self, "multiscale", tuple(self.multiscale))
        if any(not 0 < share <= 1 for share in self.multiscale):
            raise ValueError(f"multiscale is {self.multiscale}; shares of the shorter side lie above 0, at most 1")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; it must be at least 1")
        for name, allowed in (("mix_mode", ("batch", "elem")), ("on", ("cpu", "device"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(map(repr, allowed))}")
        if self.randaugment is not None:
            RandAugment.parse(self.randaugment)


@dataclass(frozen=True)
class AugmentPlan:
    """All random decisions about one clip. Boxes are top, left, height, width in pixels."""

    crop: Box
    flip: bool = False
    operations: tuple[Operation, ...] = ()
    jitter: tuple[tuple[str, float], ...] = ()  # operation and factor, in the order of use
    erase: Box | None = None  # in the resized crop
    noise: int = 0  # seed of the noise in the erased box


__getattr__: Callable[[str], object] = renamed(__name__, {"Plan": "AugmentPlan"})


def draw(settings: AugmentSettings, size: int, height: int, width: int, rng: np.random.Generator) -> AugmentPlan:
    """Draw all random decisions about one clip.

    Args:
        settings: the allowed changes.
        size: side of the result in pixels.
        height: of the stored frames.
        width: of the stored frames.
        rng: source of all randomness; the same state gives the same plan. PyTorch's generators keep their states.
    """
    crops, jittering = _transforms(settings, size)
    operations = RandAugment.parse(settings.randaugment).draw(rng) if settings.randaugment else ()
    flip = bool(rng.random() < settings.flip)
    with torch.random.fork_rng(devices=()):
        # torchvision draws from this generator; torch.manual_seed would also look for GPUs.
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        if settings.multiscale:
            box = _multiscale(settings.multiscale, size, height, width, rng)
        else:
            crop = crops.make_params([_blank(height, width)])
            box = (crop["top"], crop["left"], crop["height"], crop["width"])
        erase = _erased(size, rng) if rng.random() < settings.erasing else None
        jitter: tuple[tuple[str, float], ...] = ()
        if settings.color_jitter:
            drawn = jittering.make_params([])
            jitter = tuple((name, float(drawn[f"{name}_factor"])) for name in _jitter_order(drawn["fn_idx"].tolist()))
    return AugmentPlan(
        crop=box,
        flip=flip,
        operations=operations,
        jitter=jitter,
        erase=erase,
        noise=int(rng.integers(2**63)),
    )


def _erased(size: int, rng: np.random.Generator) -> Box | None:
    """A box inside a picture of `size` x `size`, by the published limits; None if no try of a hundred fits.

    torchvision's own erasing tries ten times and then erases the whole picture.
    """
    for _ in range(_ERASING_TRIES):
        area = size * size * rng.uniform(*_ERASED_AREA)
        aspect = math.exp(rng.uniform(*_ERASED_ASPECT))  # height over width
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < size and width < size:
            return int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1)), height, width
    return None


def _multiscale(shares: tuple[float, ...], size: int, height: int, width: int, rng: np.random.Generator) -> Box:
    """A crop of VideoMAE's pre-training: two neighbouring sizes, on a grid of quarters of the remaining room.

    The published code takes 13 of the grid's 25 points: corners, middles of the edges, centre, and the four between
    centre and corners.
    """
    sides = [int(min(height, width) * share) for share in shares]
    sides = [size if abs(side - size) < _SNAP else side for side in sides]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    high, wide = pairs[int(rng.integers(len(pairs)))]
    places = [(y, x) for y in range(5) for x in range(5) if y % 2 == x % 2]
    down, across = places[int(rng.integers(len(places)))]
    return down * ((height - high) // 4), across * ((width - wide) // 4), high, wide


def apply(plan: AugmentPlan, video: Tensor, size: int) -> Tensor:
    """Execute a plan.

    Args:
        plan: from `draw`.
        video: uint8 `[T, 3, H, W]`, the stored frames, on any device.
        size: side of the result in pixels.

    Returns:
        float32 `[3, T, size, size]`, normalised with ImageNet's mean and deviation, contiguous, on the same device.
    """
    from torchvision.transforms.v2 import functional as F

    for name, factor in plan.jitter:
        video = getattr(F, f"adjust_{name}")(video, factor)
    for operation in plan.operations:
        video = operation(video)
    video = F.normalize(F.to_dtype(F.crop(video, *plan.crop), torch.float32, scale=True), list(MEAN), list(STD))
    video = F.resize(video, [size, size], antialias=False)
    if plan.flip:
        video = F.horizontal_flip(video)
    if plan.erase:
        video = F.erase(video, *plan.erase, _noise(plan, video))
    return video.transpose(0, 1).contiguous()


def _noise(plan: AugmentPlan, video: Tensor) -> Tensor:
    """New noise for every frame, as in the published code. The CPU draws it, so it does not depend on the device."""
    assert plan.erase is not None
    generator = torch.Generator().manual_seed(plan.noise)
    return torch.randn((len(video), 3, *plan.erase[2:]), generator=generator).to(video.device)


@cache
def _transforms(settings: AugmentSettings, size: int) -> tuple[Any, Any]:
    """torchvision's random crop and colour jitter; only their draws are used."""
    from torchvision.transforms import v2

    amount = settings.color_jitter
    crops = v2.RandomResizedCrop(size, tuple(settings.scale), tuple(settings.ratio))
    return crops, v2.ColorJitter(amount, amount, amount)


def _blank(height: int, width: int) -> Tensor:
    """A picture without memory: torchvision only reads its height and width."""
    return torch.empty(3, height, width, device="meta")


def _jitter_order(order: list[int]) -> list[str]:
    names = ("brightness", "contrast", "saturation", "hue")
    return [names[index] for index in order if names[index] != "hue"]
