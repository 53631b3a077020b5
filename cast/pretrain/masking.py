"""The tokens that the encoder sees, and the targets of the hidden ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cast.ground.transfer import to_device
from cast.video.transforms import MEAN, STD

#: Added to a patch's deviation before the division by it, for pixels from 0 to 1 (the official code's value).
_EPS = 1e-6


class Mask(NamedTuple):
    """Token numbers t * N + n, int64, ascending: `visible` [B, T * (N - m)], `hidden` [B, T * m]."""

    visible: Tensor
    hidden: Tensor


def tube_mask(clips: int, frames: int, patches: int, ratio: float, device: torch.device | str = "cpu") -> Mask:
    """Hide the same patches in all frames, so that no hidden patch is visible a moment later (paper section 3.3).

    PyTorch's generator of the CPU draws the mask, so it does not depend on the device.

    Args:
        clips: B.
        frames: T, tokens along time.
        patches: N, tokens of a frame.
        ratio: hidden share of the N patches; m = floor(ratio * N) are hidden.
        device: of the result.

    Raises:
        ValueError: nothing would be hidden, or everything.
    """
    hidden = hidden_patches(patches, ratio)
    order = torch.rand(clips, patches).argsort(1)
    times = torch.arange(frames)[:, None] * patches

    def tubes(chosen: Tensor) -> Tensor:
        return to_device((times + chosen.sort(1).values[:, None]).flatten(1), device)

    return Mask(tubes(order[:, hidden:]), tubes(order[:, :hidden]))


def hidden_patches(patches: int, ratio: float) -> int:
    """m, hidden patches of a frame.

    Raises:
        ValueError: none would be hidden, or all.
    """
    hidden = int(ratio * patches)
    if not 0 < hidden < patches:
        raise ValueError(
            f"mask_ratio {ratio} hides {hidden} of a frame's {patches} patches; some must be hidden and some visible"
        )
    return hidden


def tubelets(video: Tensor, tubelet: int, patch: int) -> Tensor:
    """[B, 3, frames, H, W] -> [B, T*N, tubelet * patch * patch, 3], tokens ordered by time, row, column."""
    batch, channels, frames, height, width = video.shape
    parts = video.reshape(batch, channels, frames // tubelet, tubelet, height // patch, patch, width // patch, patch)
    return parts.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, -1, tubelet * patch * patch, channels)


def assemble(tokens: Tensor, frames: int, tubelet: int, patch: int) -> Tensor:
    """The inverse of :func:`tubelets` for square frames: [B, T*N, tubelet * patch * patch, 3] -> a video."""
    batch, count = tokens.shape[:2]
    grid = round((count * tubelet // frames) ** 0.5)
    parts = tokens.reshape(batch, frames // tubelet, grid, grid, tubelet, patch, patch, 3)
    return parts.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, 3, frames, grid * patch, grid * patch)


def gather(tokens: Tensor, chosen: Tensor) -> Tensor:
    """The tokens [B, L, ...] with numbers [B, K] -> [B, K, ...]."""
    index = chosen.reshape(*chosen.shape, *([1] * (tokens.ndim - 2)))
    return tokens.gather(1, index.expand(*chosen.shape, *tokens.shape[2:]))


def pixels(tokens: Tensor) -> Tensor:
    """Tokens of a video, normalised like the model's input -> pixels from 0 to 1. Channels come last in both."""
    mean, std = (to_device(torch.tensor(values, dtype=tokens.dtype), tokens.device) for values in (MEAN, STD))
    return tokens * std + mean


def statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [B, K, 1, 3] of each channel of each token, for the normalisation of targets."""
    return tokens.mean(2, keepdim=True), tokens.var(2, keepdim=True).sqrt() + _EPS
