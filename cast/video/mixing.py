"""Mixup, CutMix and label smoothing for batches of clips with any number of label heads.

All heads share the mixing: one lambda, one box, one partner for a clip. The partner comes from the reversed batch, as
in the published code and in timm. `torchvision.transforms.v2.MixUp` rolls the batch by one instead, and silently leaves
a second label unmixed. CutMix cuts the same box out of every frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cast.ground.transfer import to_device
from cast.video.augment import AugmentSettings


@dataclass(frozen=True)
class Mixing:
    """Mixes a batch with its own reverse and smooths its labels.

    Args:
        mixup_alpha: of mixup's Beta distribution, 0 for none (paper: 0.8).
        cutmix_alpha: of CutMix's, 0 for none (published scripts: none).
        probability: share of the batches (or clips, in mode "elem") that are mixed.
        switch_probability: share of CutMix among mixed batches, if both kinds are on.
        smoothing: the share of a label that is spread evenly over all classes of its head (paper: 0.1).
        mode: "batch" draws once per batch, "elem" once per clip.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5
    smoothing: float = 0.0
    mode: Literal["batch", "elem"] = "batch"

    @classmethod
    def of(cls, settings: AugmentSettings) -> Mixing:
        """The mixing of some augmentation settings."""
        return cls(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            probability=settings.mix_probability,
            switch_probability=settings.mix_switch,
            smoothing=settings.smoothing,
            mode=settings.mix_mode,
        )

    def __call__(
        self,
        video: Tensor,
        labels: Mapping[str, Tensor],
        classes: Mapping[str, int],
        seed: int | Sequence[int] | np.random.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mix a batch, without changing the arguments.

        Args:
            video: floating point `[B, 3, T, H, W]` (or any `[B, ..., H, W]`).
            labels: class indices, head -> int64 `[B]`; on the CPU, reading them does not wait for a GPU.
            classes: number of classes by head.
            seed: of all randomness; numbers such as (seed, epoch, position), or a generator, whose state advances.

        Returns:
            The mixed video, and soft targets, head -> float32 `[B, classes]`; rows sum to 1. Targets are smoothed
            whether or not the batch was mixed.

        Raises:
            ValueError: a head without a number of classes, or a label that is too large.
        """
        rng = np.random.default_rng(seed)  # a generator passes through
        count = len(video)
        mixes = self._draw(rng, 1 if self.mode == "batch" else count, *video.shape[-2:])
        mixes = mixes * count if self.mode == "batch" else mixes
        shares = torch.tensor([mix.share for mix in mixes], dtype=torch.float32)
        targets = {head: self._targets(head, label, classes, shares) for head, label in labels.items()}
        return _mixed(video, mixes, to_device(shares, video.device)), targets

    def _draw(self, rng: np.random.Generator, count: int, height: int, width: int) -> list[_Mix]:
        result = []
        for _ in range(count):
            mix = _Mix()
            if rng.random() < self.probability and (self.mixup_alpha or self.cutmix_alpha):
                cut = not self.mixup_alpha or bool(self.cutmix_alpha and rng.random() < self.switch_probability)
                alpha = self.cutmix_alpha if cut else self.mixup_alpha
                share = float(rng.beta(alpha, alpha))
                mix = _cut(share, height, width, rng) if cut else _Mix(share)
            result.append(mix)
        return result

    def _targets(self, head: str, label: Tensor, classes: Mapping[str, int], shares: Tensor) -> Tensor:
        if head not in classes:
            raise ValueError(f"there are labels for {head!r}, but classes are given for {sorted(classes)}")
        number = classes[head]
        if label.numel() and not 0 <= int(label.min()) <= int(label.max()) < number:
            raise ValueError(f"labels of {head!r} are {int(label.min())} to {int(label.max())}; classes are {number}")
        spread = self.smoothing / number
        target = torch.full((len(label), number), spread, device=label.device)
        target.scatter_(1, label[:, None], 1 - self.smoothing + spread)
        share = to_device(shares, label.device)[:, None]
        return target * share + target.flip(0) * (1 - share)


@dataclass(frozen=True)
class _Mix:
    """The part of a clip that stays: `share` of every pixel, or all outside of `box` (top, bottom, left, right)."""

    share: float = 1.0
    box: tuple[int, int, int, int] | None = None


def _cut(share: float, height: int, width: int, rng: np.random.Generator) -> _Mix:
    """A box of 1 - `share` of the picture around a random centre. The part outside the picture is cut off and not
    counted.
    """
    side = (1 - share) ** 0.5
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    return _Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def _mixed(video: Tensor, mixes: Sequence[_Mix], shares: Tensor) -> Tensor:
    if all(mix.share == 1.0 for mix in mixes):
        return video
    other = video.flip(0)
    if all(mix.box is None for mix in mixes):
        share = shares.to(video.dtype).view(-1, *[1] * (video.ndim - 1))
        return video * share + other * (1 - share)
    result = video.clone()
    for index, mix in enumerate(mixes):
        if mix.box is None:
            result[index] = video[index] * mix.share + other[index] * (1 - mix.share)
        else:
            top, bottom, left, right = mix.box
            result[index, ..., top:bottom, left:right] = other[index, ..., top:bottom, left:right]
    return result
