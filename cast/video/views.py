"""The views of a video: the clips for a test, a validation and a prediction, made from its file.

Published (paper section 4.2; the official code's semantics): `views` temporal views times `crops` square crops along
the longer side, 2 x 3 for EPIC-Kitchens-100 and Something-Something V2, 5 x 3 for Kinetics-400. The answer is the mean
over the clips of the softmax of each clip's logits.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cast.video.decoders import Decoder, Name, decoder
from cast.video.sampling import PUBLISHED_VIEWS, Sampling, view_indices
from cast.video.transforms import MEAN, STD, to_clip, view_transform


@dataclass(frozen=True)
class Protocol:
    """Clips of a test.

    Args:
        sampling: "uniform" (EPIC-Kitchens-100, Something-Something V2) or "dense" (Kinetics-400).
        views: temporal views; 0 means the published number, 2 for uniform and 5 for dense sampling.
        crops: spatial crops of each view, evenly spaced along the longer side; 1 is the centre.
        frames: frames of a clip.
        size: side of a clip in pixels.
        decoder: name of the decoder, see `cast.video.decoders`.
        short_side: pictures with a longer shorter side are first shrunk, see `cast.video.shrink`; None leaves them. It
            must equal that of the model's training.

    Raises:
        ValueError: an unknown sampling, or a number below 1.
    """

    sampling: Sampling = "uniform"
    views: int = 0
    crops: int = 3
    frames: int = 16
    size: int = 224
    decoder: Name = "pyav"
    short_side: int | None = None

    def __post_init__(self) -> None:
        if self.sampling not in PUBLISHED_VIEWS:
            raise ValueError(f"sampling is {self.sampling!r}; it must be {' or '.join(map(repr, PUBLISHED_VIEWS))}")
        if self.views == 0:
            object.__setattr__(self, "views", PUBLISHED_VIEWS[self.sampling])
        for name in ("views", "crops", "frames", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side is {self.short_side}; it must be at least 1, or None")

    @property
    def clips(self) -> int:
        """Clips of a video: views times crops, crops varying fastest."""
        return self.views * self.crops

    @property
    def name(self) -> str:
        """The name in the literature, views before crops: 2x3."""
        return f"{self.views}x{self.crops}"

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments, for JSON. Without a short side it has no such entry, as in earlier versions."""
        values = asdict(self)
        if self.short_side is None:
            del values["short_side"]
        return values

    @cached_property
    def _reader(self) -> Decoder:
        return decoder(self.decoder, self.short_side)

    def centre(self) -> Protocol:
        """The same protocol with a single view, cropped at the centre, as in validation."""
        return replace(self, views=1, crops=1)

    def indices(self, length: int) -> np.ndarray:
        """The frames of each view in a video of `length` frames, int64 [views, frames]."""
        views = range(self.views)
        return np.stack([view_indices(length, view, self.views, self.sampling, self.frames) for view in views])

    def read(self, path: str | os.PathLike[str], threads: int = 1) -> Tensor:
        """All clips of a video, uint8 [clips, 3, frames, size, size]; every frame is decoded once.

        Raises:
            VideoError: the file can't be read as a video.
        """
        unique, places = np.unique(self.indices(self._reader.frame_count(path, threads)), return_inverse=True)
        pictures = self._reader.read(path, unique, threads)
        cut = [
            to_clip(pictures, view_transform(self.size, crop, self.crops, normalise=False))
            for crop in range(self.crops)
        ]
        rows = torch.from_numpy(places.reshape(self.views, self.frames))
        return torch.stack([crop[:, view] for view in rows for crop in cut])


def normalise(clips: Tensor) -> Tensor:
    """uint8 [..., 3, T, S, S] -> float32 with ImageNet's mean and deviation, on the clips' device.

    Uses torchvision's own functions, so that the bits equal those of a transform that normalises.
    """
    from torchvision.transforms.v2 import functional

    pictures = functional.to_dtype(clips.transpose(-4, -3), torch.float32, scale=True)
    return functional.normalize(pictures, list(MEAN), list(STD)).transpose(-4, -3).contiguous()
