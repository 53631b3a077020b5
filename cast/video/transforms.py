"""From decoded frames to the model's input, with torchvision.transforms.v2.

A transform is any callable from uint8 `[T, 3, H, W]` (a `torchvision.tv_tensors.Video`) to `[T, 3, size, size]`, so
your own `torchvision.transforms.v2.Compose` fits. torchvision is imported only when a transform is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: ImageNet's statistics of RGB in 0..1; both experts take them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Transform = Callable[[Tensor], Tensor]


def train_transform(
    size: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
    normalise: bool = True,
) -> Transform:
    """A random crop resized to `size` and, with `flip`, mirrored half of the time; the same for all frames of a clip.

    Args:
        size: side of the result in pixels.
        scale: smallest and largest share of the picture's area that a crop takes.
        ratio: smallest and largest width over height of a crop.
        flip: mirror left and right at random. Leave it off if labels name a direction.
        normalise: give float32 with ImageNet's mean and deviation; if not, uint8.
    """
    from torchvision.transforms import v2

    steps: list[Callable] = [v2.RandomResizedCrop(size, scale, ratio, antialias=False)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps + _normalisation(normalise))


def view_transform(size: int = 224, crop: int = 0, crops: int = 1, normalise: bool = True) -> Transform:
    """The shorter side resized to `size`, then one of `crops` square crops along the longer side.

    One crop is the centre. Three are left, centre, right (or top, centre, bottom), the published test protocol. An
    offset of half a pixel is rounded to even for one crop, and rounded down for several, as published.

    Args:
        size: side of the result in pixels.
        crop: number of the crop, `0 .. crops - 1`.
        crops: number of crops, evenly spaced from one end to the other.
        normalise: give float32 with ImageNet's mean and deviation; if not, uint8.
    """
    from torchvision.transforms import v2

    if crops < 1 or not 0 <= crop < crops:
        raise ValueError(f"crop is {crop} of {crops} crops; it must be from 0 to crops - 1")
    # The published protocol resizes without antialiasing; the published accuracies hold for that.
    steps: list[Callable] = [v2.Resize(size, antialias=False), _Cut(size, crop, crops)]
    return v2.Compose(steps + _normalisation(normalise))


@dataclass(frozen=True)
class _Cut:
    """A square of side `size`, along the longer side: number `crop` of `crops`, or the centre."""

    size: int
    crop: int
    crops: int

    def __call__(self, video: Tensor) -> Tensor:
        top, left = (self._offset(side - self.size) for side in video.shape[-2:])
        return video[..., top : top + self.size, left : left + self.size]

    def _offset(self, room: int) -> int:
        return round(room / 2) if self.crops == 1 else room * self.crop // (self.crops - 1)


def _normalisation(normalise: bool) -> list[Callable]:
    from torchvision.transforms import v2

    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)] if normalise else []


def to_clip(frames: np.ndarray, transform: Transform) -> Tensor:
    """Decoded frames, uint8 `[T, H, W, 3]` -> the model's `[3, T, size, size]`, contiguous."""
    from torchvision import tv_tensors

    video = tv_tensors.Video(torch.from_numpy(frames).permute(0, 3, 1, 2))
    clip = transform(video)
    if clip.ndim != 4 or clip.shape[:2] != video.shape[:2]:
        raise ValueError(
            f"the transform made {list(clip.shape)} of {list(video.shape)}; it must keep the first two, [T, 3, H, W]"
        )
    return clip.as_subclass(Tensor).transpose(0, 1).contiguous()
