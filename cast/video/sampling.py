"""Which frames of a video a model sees: the index rules of the published training and test protocols.

`uniform` (EPIC-Kitchens-100, Something-Something V2): one frame from each of `frames` equal segments.
`dense` (Kinetics-400): `frames` frames about four apart, from one place.

Every function returns int64 indices, ascending, each in `0 .. length - 1`. Randomness comes from the generator
that is passed in. Videos shorter than `frames` frames have their frames repeated evenly (`0 0 1 1 2 3 3 ...`); the
published code shows such a video's frame 0 sixteen times, which is an unreachable fallback there, not a choice.
"""

from __future__ import annotations

import numpy as np

from cast.sampling import Sampling as Sampling

#: Temporal views of the published test protocol.
PUBLISHED_VIEWS: dict[str, int] = {"uniform": 2, "dense": 5}

#: Distance of the frames in dense sampling.
STRIDE = 4


def train_indices(
    length: int, rng: np.random.Generator, sampling: Sampling = "uniform", frames: int = 16
) -> np.ndarray:
    """Random indices for training.

    `uniform`: one random frame from each of the segments of `length // frames` frames; the `length % frames` frames
    at the end are never picked. `dense`: a window of `4 * frames` frames at a random place, read at even steps
    (`0 4 8 12 17 21 ...`, as published: the last step ends at the window's end); a video that is no longer
    than the window is read whole at that pace, then its last frame repeated.

    Args:
        length: number of frames in the video, at least 1.
        rng: source of randomness.
        sampling: "uniform" or "dense".
        frames: number of indices.
    """
    _check(length, sampling, frames)
    if length < frames:
        return ((np.arange(frames) + rng.random(frames)) * length / frames).astype(np.int64).clip(max=length - 1)
    if sampling == "uniform":
        segment = length // frames
        return np.arange(frames) * segment + rng.integers(segment, size=frames)
    window = STRIDE * frames
    if length <= window:
        steps = np.linspace(0, length, num=length // STRIDE)
        return np.append(steps, np.full(frames - len(steps), length)).clip(0, length - 1).astype(np.int64)
    start = int(rng.integers(length - window + 1))
    return start + np.linspace(0, window, num=frames).clip(0, window - 1).astype(np.int64)


def view_indices(length: int, view: int, views: int, sampling: Sampling = "uniform", frames: int = 16) -> np.ndarray:
    """Indices of one of the `views` deterministic temporal views of the test protocol.

    `uniform`: with two views, view 0 takes the segments' starts and view 1 their middles (length 100: `0 6 12 18 ...`
    and `3 9 15 21 ...`); more views divide the segments further. `dense`: every fourth frame of the whole video, cut
    into windows of `frames` at evenly spaced starts; too short a video repeats its last frame. A single view takes
    the segments' middles, or the middle window.

    Args:
        length: number of frames in the video, at least 1.
        view: which view, `0 .. views - 1`.
        views: how many there are; published are 2 for uniform, 5 for dense sampling.
        sampling: "uniform" or "dense".
        frames: number of indices.
    """
    _check(length, sampling, frames)
    if views < 1 or not 0 <= view < views:
        raise ValueError(f"view is {view} of {views} views; it must be from 0 to views - 1")
    if sampling == "uniform" or length < frames:
        part, parts = (view, views) if views > 1 else (1, 2)
        return (np.arange(frames) * parts + part) * length // (parts * frames)
    strided = np.arange(0, length, STRIDE)
    strided = np.append(strided, np.full(max(0, frames - len(strided)), strided[-1]))
    room = len(strided) - frames
    start = room * view // (views - 1) if views > 1 else room // 2
    return strided[start : start + frames]


def _check(length: int, sampling: str, frames: int) -> None:
    if sampling not in ("uniform", "dense"):
        raise ValueError(f"sampling is {sampling!r}; it must be 'uniform' or 'dense'")
    if length < 1 or frames < 1:
        raise ValueError(f"length is {length} and frames is {frames}; both must be at least 1")
