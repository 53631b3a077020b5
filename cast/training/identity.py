"""What makes a training the one that it is: a checkpoint keeps this, and another training does not go on from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cast.training.plain import plain

if TYPE_CHECKING:  # clips that were made before need no package that reads videos
    from _typeshed import DataclassInstance

    from cast.video.annotations import Sample

#: Of an identity: names of rules that an earlier version had otherwise and that matter to this training.
RULES = "rules"


def lasting(settings: DataclassInstance, free: Sequence[str]) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from: all but `free`, such as `out` and `data.root`."""
    values = plain(settings)
    for name in free:
        section, _, key = name.partition(".")
        if key:
            values[section].pop(key)
        else:
            values.pop(section)
    return values


def changed_rules(**applies: bool) -> dict[str, list[str]]:
    """The part of an identity that tells trainings apart from those of versions with other rules.

    Args:
        applies: name of a rule that changed -> whether this training goes by it. If none does, the part is empty, and
            checkpoints from before the change are gone on from.
    """
    names = sorted(name for name, does in applies.items() if does)
    return {RULES: names} if names else {}


def fingerprint(model: nn.Module) -> str:
    """Changes with the names, shapes and trained parts of a model's parameters."""
    parts = [f"{name} {tuple(p.shape)} {p.requires_grad}" for name, p in model.named_parameters()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def videos_digest(samples: Sequence[Sample], root: str) -> str:
    """Changes with the videos' names, labels and order, on which every batch depends; not with where they lie."""
    result = hashlib.sha256()
    for line in _video_lines(samples, root):
        result.update(line)
    return result.hexdigest()[:16]


def video_hashes(samples: Sequence[Sample], root: str) -> Tensor:
    """int64 [videos]: 8 bytes for each video's name and labels, to tell later which ones are gone."""
    digests = b"".join(hashlib.sha256(line).digest()[:8] for line in _video_lines(samples, root))
    return torch.from_numpy(np.frombuffer(digests, np.int64).copy())


def _video_lines(samples: Sequence[Sample], root: str) -> Iterator[bytes]:
    for sample in samples:
        line = f"{os.path.relpath(sample.path, root)} {sorted(sample.labels.items())}\n"
        yield line.encode(errors="surrogateescape")
