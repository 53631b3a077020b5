"""The digits data set, decoded once into a file that all processes of a study share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cast.demo.clips import CachedClips, Stills, normalise
from cast.demo.dataset import Sizes, make_dataset

Progress = Callable[[str, int, int], None]
_SPLITS = ("plain", "train", "val")


class StoredClips(CachedClips):
    """Decoded clips from the file, with CachedClips' choice of frames."""

    pixels: Tensor
    labels: dict[str, Tensor]
    seed: int
    frames: int

    def __init__(self, pixels: Tensor, labels: dict[str, Tensor], seed: int = 0) -> None:
        self.pixels, self.labels, self.seed, self.frames = pixels, labels, seed, 16

    def __len__(self) -> int:
        return len(self.pixels)


class StoredPictures:
    """Pictures with one kind of label: `noun`, or `parity` (whether the digit is odd)."""

    pixels: Tensor
    labels: Tensor
    label: str

    def __init__(self, pixels: Tensor, nouns: Tensor, label: str) -> None:
        self.pixels, self.labels, self.label = pixels, nouns % 2 if label == "parity" else nouns, label

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures float32 [B, 3, size, size] and labels [B]; the same ones in every epoch."""
        chosen = torch.from_numpy(indices)
        return normalise(self.pixels[chosen]), {self.label: self.labels[chosen]}


class StudyData:
    """The data of a study, from the file that :func:`prepare` wrote."""

    def __init__(self, path: Path) -> None:
        self.stored: dict[str, Tensor] = torch.load(path, mmap=True, weights_only=True)

    def clips(self, split: str) -> StoredClips:
        """The clips of `plain` (with verbs only), `train` or `val`."""
        heads = ("verb",) if split == "plain" else ("verb", "noun")
        labels = {head: self.stored[f"{split}.{head}"] for head in heads}
        return StoredClips(self.stored[f"{split}.pixels"], labels)

    def pictures(self, label: str) -> StoredPictures:
        """Rendered stills."""
        return StoredPictures(self.stored["pictures.pixels"], self.stored["pictures.noun"], label)


def prepare(directory: Path, sizes: Sizes, pictures: int, size: int, progress: Progress) -> Path:
    """Make the data set, decode it, draw the pictures; existing parts are kept.

    Args:
        directory: receives `videos/` and the file.
        sizes: clips of each split.
        pictures: number of stills.
        size: side of the models' input in pixels.
        progress: called with the name of the step, its finished part and its total.

    Returns:
        The file for :class:`StudyData`.

    Raises:
        ValueError: the directory has a data set of other sizes.
    """
    make_dataset(directory / "videos", sizes, progress=lambda done, total: progress("videos", done, total))
    path = directory / f"decoded-{size}px-{pictures}.pt"
    if path.exists():
        return path
    stored: dict[str, Tensor] = {}
    for split in _SPLITS:
        clips = CachedClips(
            directory / "videos",
            split,
            size,
            progress=lambda done, total, s=split: progress(f"decode {s}", done, total),  # type: ignore[misc]
        )
        stored[f"{split}.pixels"] = clips.pixels
        stored |= {f"{split}.{head}": labels for head, labels in clips.labels.items()}
    stills = Stills(pictures, size, progress=lambda done, total: progress("pictures", done, total))
    stored |= {"pictures.pixels": stills.pixels, "pictures.noun": stills.nouns}
    part = path.with_suffix(".part")
    torch.save(stored, part)
    os.replace(part, path)
    return path
