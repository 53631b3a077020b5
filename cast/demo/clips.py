"""Decoded clips in memory, so that each video is read once for all trainings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cast.demo.scene import ALL, FRAMES, Classes, render_still
from cast.evaluation import VALIDATION
from cast.video.annotations import Sample, read_compositional
from cast.video.reader import read
from cast.video.sampling import train_indices, view_indices
from cast.video.transforms import MEAN, STD, view_transform


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 with ImageNet's mean and deviation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return (pixels.float() - mean) / std


class CachedClips:
    """The videos of one annotation file, all frames decoded exactly and kept as uint8 [clips, FRAMES, 3, size, size].

    Training clips take one random frame of each segment, which depends only on (seed, epoch, index). Validation clips
    take the middles.

    Args:
        directory: the data set.
        split: name of the annotation file and of the videos' folder.
        size: side of the model's input in pixels.
        heads: names of the labels.
        seed: source of the random frames.
        progress: called with the number of videos read, and of all videos.
        frames: of the model's clip.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        split: str,
        size: int,
        heads: Sequence[str] = ("verb", "noun"),
        seed: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
        frames: int = 16,
    ) -> None:
        root = Path(directory)
        self.samples: list[Sample] = read_compositional(root / f"{split}.csv", root / split)
        self.seed: int = seed
        self.frames: int = frames
        self.labels: dict[str, Tensor] = {
            head: torch.tensor([sample.labels[head] for sample in self.samples]) for head in heads
        }
        self.pixels: Tensor = torch.empty(len(self.samples), FRAMES, 3, size, size, dtype=torch.uint8)
        transform = view_transform(size, normalise=False)

        def decode(job: tuple[int, Sample]) -> None:
            number, sample = job
            frames = torch.from_numpy(read(sample.path, range(FRAMES), threads=1))
            self.pixels[number] = transform(frames.permute(0, 3, 1, 2))

        # FFmpeg works outside the interpreter's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, _ in enumerate(pool.map(decode, enumerate(self.samples)), start=1):
                progress(done, len(self.samples))

    def __len__(self) -> int:
        return len(self.samples)

    def indices(self, epoch: int, index: int) -> np.ndarray:
        """The frames of clip `index` in an epoch."""
        if epoch == VALIDATION:
            return view_indices(FRAMES, 0, 1, frames=self.frames)
        return train_indices(FRAMES, np.random.default_rng((self.seed, epoch, index)), frames=self.frames)

    def batch(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """Videos float32 [B, 3, frames, size, size] and labels [B]."""
        frames = torch.from_numpy(np.stack([self.indices(epoch, int(index)) for index in indices]))
        chosen = torch.from_numpy(indices)
        videos = normalise(self.pixels[chosen[:, None], frames]).transpose(1, 2).contiguous()
        return videos, {head: labels[chosen] for head, labels in self.labels.items()}


class Stills:
    """Single pictures with nouns, for the spatial expert. They are rendered into memory.

    Args:
        count: number of pictures.
        size: side of the model's input in pixels; must divide the scene's.
        seed: source of the pictures.
        progress: called with the number of pictures drawn, and of all pictures.
        classes: the pictures show their nouns.
    """

    def __init__(
        self,
        count: int,
        size: int,
        seed: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
        classes: Classes = ALL,
    ) -> None:
        self.pixels: Tensor = torch.empty(count, 3, size, size, dtype=torch.uint8)
        self.nouns: Tensor = torch.empty(count, dtype=torch.int64)
        transform = view_transform(size, normalise=False)
        for start in range(0, count, 500):
            drawn = [render_still(seed, index, classes) for index in range(start, min(start + 500, count))]
            pictures = torch.from_numpy(np.stack([picture for picture, _ in drawn])).permute(0, 3, 1, 2)
            self.pixels[start : start + len(drawn)] = transform(pictures)
            self.nouns[start : start + len(drawn)] = torch.tensor([noun for _, noun in drawn])
            progress(start + len(drawn), count)

    def __len__(self) -> int:
        return len(self.nouns)

    def batch(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures float32 [B, 3, size, size] and labels [B]; the same ones in every epoch."""
        chosen = torch.from_numpy(indices)
        return normalise(self.pixels[chosen]), {"noun": self.nouns[chosen]}
