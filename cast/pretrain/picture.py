"""A picture of the masked input, the model's reconstruction and the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cast.ground.optional import require
from cast.pretrain.masking import Mask, assemble, gather, pixels, statistics, tubelets
from cast.pretrain.model import VideoMAE

#: Frames shown of a clip, evenly spaced.
_SHOWN = 8


@torch.inference_mode()
def reconstruct(model: VideoMAE, video: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
    """Masked, reconstructed and original videos, pixels from 0 to 1: [B, 3, frames, H, W] each.

    If targets are normalised, a hidden patch's true mean and deviation are put into its reconstruction, as in the
    paper's figures: the model does not predict them.

    Args:
        model: on the video's device.
        video: [B, 3, frames, H, W], normalised like the model's input.
        mask: the tokens to hide.
    """
    config = model.config
    prediction = model(video, mask).prediction.float()
    tokens = pixels(tubelets(video.float(), config.tubelet_size, config.patch_size))
    made = prediction.unflatten(2, (-1, 3))
    if model.normalised:
        mean, deviation = statistics(gather(tokens, mask.hidden))
        made = made * deviation + mean
    index = mask.hidden[:, :, None, None].expand(-1, -1, *tokens.shape[2:])
    versions = (tokens.scatter(1, index, 0.5), tokens.scatter(1, index, made), tokens)
    sizes = (config.num_frames, config.tubelet_size, config.patch_size)
    masked, reconstructed, original = (assemble(version, *sizes).clamp(0, 1) for version in versions)
    return masked, reconstructed, original


def draw(model: VideoMAE, video: Tensor, path: Path, seed: int = 0) -> None:
    """Write a PNG: three rows a clip (masked, reconstructed, original), eight of its frames from left to right.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "demo")
    from matplotlib.figure import Figure

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        mask = model.draw(len(video), video.device)
    versions = reconstruct(model.eval(), video, mask)
    frames = np.linspace(0, video.shape[2] - 1, _SHOWN).round().astype(int)
    rows = 3 * len(video)
    figure = Figure(figsize=(_SHOWN * 0.9, rows * 0.9 + 0.2))
    axes = figure.subplots(rows, _SHOWN, squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for row in range(rows):
        clip, version = divmod(row, 3)
        for axis, frame in zip(axes[row], frames, strict=True):
            axis.imshow(versions[version][clip, :, frame].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[row][0].set_ylabel(("masked", "made", "original")[version], fontsize=7)
    for axis, frame in zip(axes[0], frames, strict=True):
        axis.set_title(f"frame {frame}", fontsize=7)
    figure.savefig(path, dpi=80, bbox_inches="tight")
