"""From a path or a name to a model: what `cast evaluate` and `cast predict` accept as a checkpoint."""

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

#: A model with a configuration of its own.
Model: TypeAlias = CAST | TwoStream | SingleExpert


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, its class names and sampling if they are known, and the file of its weights.

    `short_side` is the one that the training shrank larger pictures to, None if it did not.
    """

    model: Model
    classes: dict[str, list[str]] | None
    file: Path
    sampling: Sampling | None = None
    short_side: int | None = None

    @cached_property
    def sha256(self) -> str:
        """Of the weights' file, which is read when this is first asked for."""
        with open(self.file, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(what: str | os.PathLike[str], trust_pickle: bool = False) -> Checkpoint:
    """Load a model of any kind, from wherever it is.

    Args:
        what: a directory of CAST's or a baseline's `save_pretrained`, with `labels.json` where classes have names and
            `sampling.json` where the training's sampling is known; a training's directory, whose finished model lies
            in `model/`; a name in `cast.list_models()`; a repository of the Hub; or a file or a DeepSpeed directory
            in the official layout.
        trust_pickle: whether a torch file may run code while it loads.

    Raises:
        FileNotFoundError: there is no such model, or files are missing.
        ValueError: the weights don't fit; the message lists what doesn't.
    """
    path = locate(what)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; give a directory that save_pretrained wrote, a published checkpoint's file, "
            f"a published name ({', '.join(MODELS)}), a repository of the Hub, or to cast evaluate a predictions file"
        )
    if is_baseline(path):
        baseline = read_baseline(path)
        names = read_labels(path, baseline.config.classes)
        return Checkpoint(baseline, names, weights_file(path), read_sampling(path), read_short_side(path))
    # A published name says more than its file: what it must hold, and its sampling.
    model = load(what if os.fspath(what) in MODELS and not Path(what).exists() else path, trust_pickle=trust_pickle)
    return Checkpoint(model, model.labels, weights_file(path), model.sampling, model.short_side)
