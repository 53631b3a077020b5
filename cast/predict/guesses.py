"""A model's answer: guesses by head, best first, with the classes' names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from cast.metrics import top_classes, top_pairs
from cast.model.config import COMPOSITIONAL
from cast.model.labels import numbers, read_labels

PathLike = str | os.PathLike[str]


def path_of(video: PathLike) -> str:
    """The file's path as text, or a TypeError that names the type of `video`."""
    if isinstance(video, str | os.PathLike):
        return os.fspath(video)
    raise TypeError(
        f"a video came as {type(video).__name__}; it must be a file's path. Predictor.stream takes frames, and the "
        "model itself clips as tensors"
    )


@dataclass(frozen=True)
class Guess:
    """One answer. `index` is the class, or (verb, noun) for an action of a compositional model."""

    label: str
    index: int | tuple[int, int]
    probability: float


@dataclass(frozen=True)
class Prediction:
    """A model's answer for a video. `guesses` are by head, best first; bytes of `video` outside UTF-8 are escaped."""

    video: str
    frames: int
    views: int
    guesses: dict[str, list[Guess]]

    def to_json(self, indent: int | None = 2) -> str:
        """The prediction as a JSON object; without indent on one line."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False)


@dataclass(frozen=True)
class Failure:
    """A video without a prediction, and the reason."""

    video: str
    error: str

    def to_json(self, indent: int | None = 2) -> str:
        """The failure as a JSON object; without indent on one line."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False)


@dataclass(frozen=True)
class Moment:
    """A model's answer for a part of a stream: frames `first` to `last`, counted from 0 and both included."""

    first: int
    last: int
    guesses: dict[str, list[Guess]]

    def to_json(self, indent: int | None = 2) -> str:
        """The moment as a JSON object; without indent on one line."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False)


def load_labels(directory: PathLike, classes: Mapping[str, int]) -> dict[str, list[str]]:
    """Class names by head from `labels.json` in `directory`, or the class indices if there is no such file.

    Raises:
        ValueError: the file is no JSON, lacks a head, or the number of names of a head differs from its number of
            classes.
    """
    return read_labels(directory, classes) or numbers(classes)


def guess(probabilities: Mapping[str, Tensor], labels: Mapping[str, Sequence[str]], top: int) -> dict[str, list[Guess]]:
    """The `top` best classes of each head; with verb and noun also of their pairs, as `action`.

    Args:
        probabilities: by head, [classes], on the CPU.
        labels: class names by head.
        top: guesses per head, fewer if there are fewer classes.
    """
    guesses = {head: _best(probabilities[head], labels[head], top) for head in _ordered(probabilities)}
    if probabilities.keys() == COMPOSITIONAL:
        guesses["action"] = _best_pairs(probabilities["verb"], probabilities["noun"], labels, top)
    return guesses


def _ordered(heads: Mapping[str, Tensor]) -> list[str]:
    return sorted(heads, reverse=True)  # verb before noun, as in speech


def _best(probabilities: Tensor, labels: Sequence[str], top: int) -> list[Guess]:
    values, indices = top_classes(probabilities[None], min(top, len(probabilities)))
    return [Guess(labels[i], i, p) for i, p in zip(indices[0].tolist(), values[0].tolist(), strict=True)]


def _best_pairs(verb: Tensor, noun: Tensor, labels: Mapping[str, Sequence[str]], top: int) -> list[Guess]:
    values, pairs = top_pairs(verb[None], noun[None], min(top, len(verb) * len(noun)))
    return [
        Guess(f"{labels['verb'][v]} {labels['noun'][n]}", (v, n), p)
        for (v, n), p in zip(pairs[0].tolist(), values[0].tolist(), strict=True)
    ]


def table(prediction: Prediction | Moment) -> Table:
    """The guesses side by side, probabilities in percent."""
    result = Table()
    result.add_column("", justify="right", style="dim")
    for head in prediction.guesses:
        result.add_column(head, overflow="fold")
        result.add_column("%", justify="right", no_wrap=True)
    for row in range(max(map(len, prediction.guesses.values()))):
        cells = [str(row + 1)]
        for guesses in prediction.guesses.values():
            cells += (
                [escape(guesses[row].label), f"{100 * guesses[row].probability:.1f}"]
                if row < len(guesses)
                else ["", ""]
            )
        result.add_row(*cells, style="bold" if row == 0 else None)
    return result
