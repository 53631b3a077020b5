"""The frames of a video that a model sees: the index rules of the published training and test protocols.

`uniform` (EPIC-Kitchens-100, Something-Something V2): one frame from each of `frames` equal segments.
`dense` (Kinetics-400): `frames` frames about four apart, from one place.

Every function returns int64 indices, ascending, each in `0 .. length - 1`. All randomness comes from the given
generator. `tests/test_published.py` compares with the published code. Two rules differ on purpose, both in `uniform`.
If a video is shorter than `frames`, training repeats its frames evenly (`0 0 1 1 2 3 3 ...`); the published code shows
frame 0 sixteen times. And a single view takes the segments' middles, not their starts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cast.ground.sampling import Sampling as Sampling

#: Temporal views of the published test protocol.
PUBLISHED_VIEWS: dict[str, int] = {"uniform": 2, "dense": 5}

#: Distance of the frames in dense sampling.
STRIDE = 4

#: Chooses the frames of a training clip: length, source of randomness, sampling, frames -> indices.
Choose = Callable[[int, np.random.Generator, Sampling, int], np.ndarray]


def train_indices(
    length: int, rng: np.random.Generator, sampling: Sampling = "uniform", frames: int = 16
) -> np.ndarray:
    """Random indices for training.

    `uniform`: one random frame from each of the segments of `length // frames` frames; the last `length % frames`
    frames are never taken. `dense`: a window of `4 * frames` frames at a random place, read at even steps (`0 4 8 12 17
    21 ...`, as published: the last step ends at the window's end, and no window contains the last frame). A video that
    is not longer than the window is read whole in such steps, and its last frame is repeated.

    Args:
        length: number of frames in the video, at least 1.
        rng: source of randomness.
        sampling: "uniform" or "dense".
        frames: number of indices.
    """
    _check(length, sampling, frames)
    if sampling == "dense":
        return _dense_window(length, rng, frames)
    if length < frames:
        return ((np.arange(frames) + rng.random(frames)) * length / frames).astype(np.int64).clip(max=length - 1)
    segment = length // frames
    return np.arange(frames) * segment + rng.integers(segment, size=frames)


def _dense_window(length: int, rng: np.random.Generator, frames: int) -> np.ndarray:
    window = STRIDE * frames
    if length <= window:
        steps = np.linspace(0, length, num=length // STRIDE)
        return np.append(steps, np.full(frames - len(steps), length)).clip(0, length - 1).astype(np.int64)
    start = int(rng.integers(length - window))
    return start + np.linspace(0, window, num=frames).clip(0, window - 1).astype(np.int64)


def stride_indices(
    length: int, rng: np.random.Generator, sampling: Sampling = "dense", frames: int = 16, stride: int = STRIDE
) -> np.ndarray:
    """Random indices for VideoMAE's pre-training. Dense steps are exactly `stride` frames.

    `dense`: a window of `stride * frames` frames at a random place. In a video that is not longer, steps end before its
    last frame and the last step is repeated, as in VideoMAE's code. `uniform`: as :func:`train_indices`.

    Args:
        length: number of frames in the video, at least 1.
        rng: source of randomness.
        sampling: "uniform" or "dense".
        frames: number of indices.
        stride: frames from one index to the next, at least 1.
    """
    if sampling != "dense":
        return train_indices(length, rng, sampling, frames)
    _check(length, sampling, frames)
    if stride < 1:
        raise ValueError(f"stride is {stride}; it must be at least 1")
    steps, window = np.arange(frames) * stride, stride * frames
    if length <= window:
        return steps.clip(max=max(length - 2, 0) // stride * stride)
    return int(rng.integers(length - window + 1)) + steps


def view_indices(length: int, view: int, views: int, sampling: Sampling = "uniform", frames: int = 16) -> np.ndarray:
    """Indices of one of the `views` deterministic temporal views of the test protocol.

    `uniform`: with two views, view 0 takes the segments' starts and view 1 their middles (length 100: `0 6 12 18 ...`
    and `3 9 15 21 ...`); more views divide the segments further. `dense`: every fourth frame of the whole video, cut
    into windows of `frames` at evenly spaced starts; if there are too few frames, the last is repeated (length 10: `0 4
    8 8 8 ...`). A single view takes the segments' middles (published: their starts, which are view 0 of 2), or the
    middle window (published: none).

    Args:
        length: number of frames in the video, at least 1.
        view: number of the view, `0 .. views - 1`.
        views: number of views; published are 2 for uniform, 5 for dense sampling.
        sampling: "uniform" or "dense".
        frames: number of indices.
    """
    _check(length, sampling, frames)
    if views < 1 or not 0 <= view < views:
        raise ValueError(f"view is {view} of {views} views; it must be from 0 to views - 1")
    if sampling == "uniform":
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
