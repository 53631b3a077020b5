"""A model from a path or a name, as `cast evaluate` and `cast predict` take checkpoints."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from cast.baselines import SingleExpert, TwoStream, is_baseline, read_baseline
from cast.ground.sampling import Sampling, read_sampling, read_short_side
from cast.model import CAST
from cast.model.labels import read_labels
from cast.model.weights.source import weights_file
from cast.model.zoo import MODELS, load, locate

#: A model with its own configuration.
Model: TypeAlias = CAST | TwoStream | SingleExpert


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, its class names and sampling if they are known, and the file of its weights.

    The training shrank larger pictures to `short_side` pixels; None if it did not.
    """

    model: Model
    classes: dict[str, list[str]] | None
    file: Path
    sampling: Sampling | None = None
    short_side: int | None = None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights' file. The first use reads the file."""
        with open(self.file, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(what: str | os.PathLike[str], trust_pickle: bool = False) -> Checkpoint:
    """Load a model of any kind.

    Args:
        what: a directory of CAST's or a baseline's `save_pretrained`, with `labels.json` if classes have names and
            `sampling.json` if the training's sampling is known; a training's directory, with the finished model in
            `model/`; a name in `cast.list_models()`; a repository of the Hub; or a file or a DeepSpeed directory in the
            official layout.
        trust_pickle: whether a torch file may run code while it loads.

    Raises:
        FileNotFoundError: there is no such model, or files are missing.
        ValueError: the weights don't fit; the message lists the differences.
    """
    path = locate(what)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; give a directory that save_pretrained wrote, a published checkpoint's file, "
            f"a published name ({', '.join(MODELS)}), a repository of the Hub, or (cast evaluate) a predictions file"
        )
    if is_baseline(path):
        baseline = read_baseline(path)
        names = read_labels(path, baseline.config.classes)
        return Checkpoint(baseline, names, weights_file(path), read_sampling(path), read_short_side(path))
    # A published name gives more than its file: the expected configuration, and the sampling.
    model = load(what if os.fspath(what) in MODELS and not Path(what).exists() else path, trust_pickle=trust_pickle)
    return Checkpoint(model, model.labels, weights_file(path), model.sampling, model.short_side)
