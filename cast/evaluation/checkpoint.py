"""From a path to a model: what `cast evaluate` accepts as a checkpoint."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cast.baselines import SingleExpert, TwoStream, is_baseline, read_baseline
from cast.labels import read_labels
from cast.model import CAST
from cast.sampling import Sampling, read_sampling, read_short_side
from cast.weights.source import weights_file
from cast.zoo import MODELS, load, locate

#: Files that hold answers rather than weights.
PREDICTIONS = (".jsonl", ".parquet")
#: A training's log, in its directory.
LOG = "log.jsonl"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, its class names and sampling if they are known, and the SHA-256 of its weights' file.

    `short_side` is the one that the training shrank larger pictures to, None if it did not.
    """

    model: CAST | TwoStream | SingleExpert
    classes: dict[str, list[str]] | None
    sha256: str
    sampling: Sampling | None = None
    short_side: int | None = None


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
            f"a published name ({', '.join(MODELS)}), a repository of the Hub, or a predictions file"
        )
    if is_baseline(path):
        baseline = read_baseline(path)
        names = read_labels(path, baseline.config.classes)
        sha256 = _sha256(weights_file(path))
        return Checkpoint(baseline, names, sha256, read_sampling(path), read_short_side(path))
    # A published name says more than its file: what it must hold, and its sampling.
    model = load(what if os.fspath(what) in MODELS and not Path(what).exists() else path, trust_pickle=trust_pickle)
    return Checkpoint(model, model.labels, _sha256(weights_file(path)), model.sampling, model.short_side)


def find_log(path: str | os.PathLike[str]) -> Path | None:
    """The log of the training that made a checkpoint, if it lies in the training's directory."""
    if not Path(path).exists():  # a published name: what lies in the working directory is not its log
        return None
    places = [Path(path) / LOG, Path(path).parent / LOG]
    return next((place for place in places if place.is_file()), None)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
