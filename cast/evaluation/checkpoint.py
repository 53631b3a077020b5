"""From a path to a model: what `cast evaluate` accepts as a checkpoint."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cast.baselines import SingleExpert, TwoStream, is_baseline, read_baseline
from cast.labels import read_labels
from cast.model import CAST, load_official_checkpoint

#: Files that hold answers rather than weights.
PREDICTIONS = (".jsonl", ".parquet")
#: A training's log, in its directory.
LOG = "log.jsonl"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, its class names if they are beside it, and the SHA-256 of its weights' file."""

    model: CAST | TwoStream | SingleExpert
    classes: dict[str, list[str]] | None
    sha256: str


def load_checkpoint(path: str | os.PathLike[str], trust_pickle: bool = False) -> Checkpoint:
    """Load a directory that `save_pretrained` wrote, or a published checkpoint's file.

    Args:
        path: a directory of CAST's or a baseline's `save_pretrained`, with `labels.json` where classes have names; a
            training's directory, whose finished model lies in `model/`; or a file in the official layout.
        trust_pickle: whether a torch file may run code while it loads.

    Raises:
        FileNotFoundError: there is nothing at `path`, or files are missing in it.
        ValueError: the weights don't fit; the message lists what doesn't.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "config.json").is_file() and (path / "model").is_dir():
            path = path / "model"
        model = _read_model(path)
        names = read_labels(path, model.config.classes)
        return Checkpoint(model, names, _sha256(path / _WEIGHTS))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; give a directory that save_pretrained wrote, a published checkpoint's file, "
            "or a predictions file"
        )
    return Checkpoint(load_official_checkpoint(path, trust_pickle=trust_pickle), None, _sha256(path))


def _read_model(path: Path) -> CAST | TwoStream | SingleExpert:
    try:
        if is_baseline(path):
            return read_baseline(path)
        return CAST.from_pretrained(path)
    except (TypeError, UnicodeDecodeError) as error:  # a configuration with unknown fields, or no text
        raise ValueError(f"{path / 'config.json'}: {error}") from None


def find_log(path: str | os.PathLike[str]) -> Path | None:
    """The log of the training that made a checkpoint, if it lies in the training's directory."""
    places = [Path(path) / LOG, Path(path).parent / LOG]
    return next((place for place in places if place.is_file()), None)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
