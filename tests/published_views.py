"""The published test protocol spelled out, clip by clip: what the product's own reading is compared with."""

from __future__ import annotations

import os
from collections.abc import Iterator

from torch import Tensor

from cast.video.reader import frame_count, read
from cast.video.sampling import PUBLISHED_VIEWS, Sampling, view_indices
from cast.video.transforms import to_clip, view_transform


def views_of(
    path: str | os.PathLike[str],
    size: int = 224,
    sampling: Sampling = "uniform",
    views: int | None = None,
    crops: int = 3,
    frames: int = 16,
) -> Iterator[Tensor]:
    """Normalised clips [3, frames, size, size], every crop of every view decoded and cut by itself."""
    views, length = views or PUBLISHED_VIEWS[sampling], frame_count(path, 1)
    for view in range(views):
        pictures = read(path, view_indices(length, view, views, sampling, frames), 1)
        for crop in range(crops):
            yield to_clip(pictures, view_transform(size, crop, crops))
