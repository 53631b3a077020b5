"""The identity of a training. A checkpoint keeps it; a training with another identity cannot resume from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cast.training.plain import plain

if TYPE_CHECKING:  # training on clips in memory needs no package that reads videos
    from _typeshed import DataclassInstance

    from cast.video.annotations import Sample

#: Key of an identity: the names of changed rules that matter to this training.
RULES = "rules"


def lasting(settings: DataclassInstance, free: Sequence[str]) -> dict[str, Any]:
    """The settings that must be equal to resume from a checkpoint: all but `free`, such as `out` and `data.root`."""
    values = plain(settings)
    for name in free:
        section, _, key = name.partition(".")
        if key:
            values[section].pop(key)
        else:
            values.pop(section)
    return values


def changed_rules(**applies: bool) -> dict[str, list[str]]:
    """The part of an identity that separates trainings from those of versions with other rules.

    Args:
        applies: name of a changed rule -> whether this training uses it. If it uses none, the part is empty, and
            checkpoints from before the change can be resumed.
    """
    names = sorted(name for name, does in applies.items() if does)
    return {RULES: names} if names else {}


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and trained flags of a model's parameters."""
    parts = [f"{name} {tuple(p.shape)} {p.requires_grad}" for name, p in model.named_parameters()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def videos_digest(samples: Sequence[Sample], root: str) -> str:
    """A hash of the videos' names, labels and order, which determine every batch. It does not depend on `root`."""
    result = hashlib.sha256()
    for line in _video_lines(samples, root):
        result.update(line)
    return result.hexdigest()[:16]


def video_hashes(samples: Sequence[Sample], root: str) -> Tensor:
    """int64 [videos]: 8 bytes for each video's name and labels, to find out later which ones are gone."""
    digests = b"".join(hashlib.sha256(line).digest()[:8] for line in _video_lines(samples, root))
    return torch.from_numpy(np.frombuffer(digests, np.int64).copy())


def _video_lines(samples: Sequence[Sample], root: str) -> Iterator[bytes]:
    for sample in samples:
        line = f"{os.path.relpath(sample.path, root)} {sorted(sample.labels.items())}\n"
        yield line.encode(errors="surrogateescape")
