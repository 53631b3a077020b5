"""Deprecated: a data set of clips for the caller's own DataLoader. `ClipLoader` and `Protocol` make all clips here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cast.video.annotations import Sample
from cast.video.decoders import decoder
from cast.video.sampling import Sampling, train_indices
from cast.video.transforms import Transform, to_clip
from cast.video.views import Protocol


class VideoDataset(Dataset[tuple[Tensor, dict[str, int]]]):
    """Deprecated: :class:`cast.video.loader.ClipLoader` makes batches, :class:`cast.video.views.Protocol` tests' clips.

    One clip per video: `(video, labels)`, video `[3, frames, size, size]` from the transform.

    Training clips are random, but depend only on (seed, epoch, index): not on the number of workers, the order of
    reading or earlier calls. Call `set_epoch` before each epoch; persistent workers see it too.
    Validation clips take the middles of the video's segments (uniform) or its middle window (dense).

    Args:
        samples: the videos, for example from `cast.video.annotations.read_compositional`.
        transform: from uint8 `[T, 3, H, W]` to `[T, 3, size, size]`; see `cast.video.transforms`.
        train: draw frames at random.
        sampling: "uniform" or "dense"; see `cast.video.sampling`.
        frames: frames of a clip.
        seed: source of all randomness, together with epoch and index.
        threads: decoding threads. DataLoader workers are already processes, so more than 1 slows them down.
        short_side: pictures with a longer shorter side are shrunk before the transform, see `cast.video.shrink`; None
            leaves them.

    Raises:
        ValueError: there are no samples, or their files are missing; the message counts these and names three.
    """

    transform: Transform
    train: bool
    frames: int
    seed: int
    threads: int
    short_side: int | None

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Transform,
        train: bool,
        sampling: Sampling = "uniform",
        frames: int = 16,
        seed: int = 0,
        threads: int = 1,
        short_side: int | None = None,
    ) -> None:
        warnings.warn(
            "VideoDataset is deprecated: cast.video.loader.ClipLoader makes batches, and cast.video.views.Protocol the "
            "clips of a test",
            DeprecationWarning,
            stacklevel=2,
        )
        missing = [sample.path for sample in samples if not os.path.exists(sample.path)]
        if not samples or missing:
            names = ", ".join(str(path) for path in missing[:3])
            raise ValueError(f"{len(missing)} of {len(samples)} videos are missing: {names or 'there are no samples'}")
        self.samples: list[Sample] = list(samples)
        self.transform, self.train, self.sampling = transform, train, sampling
        self.frames, self.seed, self.threads, self.short_side = frames, seed, threads, short_side
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch of the random draws."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other clips from now on; the same epoch gives the same clips."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, int]]:
        sample = self.samples[index]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        reader = decoder("pyav", self.short_side)
        length = reader.frame_count(sample.path, self.threads)
        if self.train:
            indices = train_indices(length, rng, self.sampling, self.frames)
        else:
            indices = Protocol(self.sampling, 1, 1, self.frames).indices(length)[0]
        frames = reader.read(sample.path, indices, self.threads)
        # torchvision draws from torch's global generator: seed it for this clip, then restore it.
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(rng.integers(2**63)))
            return to_clip(frames, self.transform), dict(sample.labels)
