"""A model's answers on a set of videos, in memory and in a file.

A file has every probability exactly (float32), the labels, the class names and its origin. So all metrics, comparisons
and reports can be made again without a model.

JSONL: the first line is `{"format": "cast-predictions", "about": {...}, "classes": {head: [names]}}`, every other line
one sample: `{"video", "labels": {head: class}, "views": {head: [class]}, "probabilities": {head: [...]}}`.
Parquet: the same, in columns `video`, `label_<head>`, `views_<head>`, `probability_<head>`; the first line is in the
file's metadata under `cast-predictions`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cast.ground.files import text_lines, write_bytes, write_text
from cast.ground.optional import require

PathLike = str | os.PathLike[str]

_FORMAT = "cast-predictions"
_HINT = "give a .jsonl or .parquet file that `cast evaluate` wrote"


@dataclass(frozen=True)
class Predictions:
    """Answers on samples, in the data set's order.

    Args:
        videos: the samples' names, unique and without their folder's path.
        probabilities: head -> float32 [samples, classes], the mean of the views' softmax.
        labels: head -> int64 [samples]; empty if the data set has none.
        views: head -> int64 [samples, views], each view's own best guess.
        classes: head -> class names.
        about: the origin: the model's name under `model`, checkpoint, data set, protocol. It has nothing that varies
            between runs.
        subsets: name -> bool [samples], hard samples with their own accuracy, see `cast.evaluation.subsets`. They come
            from the data set, so no file has them.
    """

    videos: Sequence[str]
    probabilities: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    views: Mapping[str, Tensor]
    classes: Mapping[str, Sequence[str]]
    about: Mapping[str, Any] = field(default_factory=dict)
    subsets: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.videos)
        if not count or len(set(self.videos)) != count:
            raise ValueError(f"{count} samples with {len(set(self.videos))} different names; every name must be unique")
        for what, tensors in (("probabilities", self.probabilities), ("labels", self.labels), ("views", self.views)):
            wrong = {head: list(tensor.shape) for head, tensor in tensors.items() if len(tensor) != count}
            if wrong:
                raise ValueError(f"{what} have shapes {wrong} for {count} samples; the first sizes must agree")
        for head, names in self.classes.items():
            if self.probabilities[head].shape[1:] != (len(names),):
                shape = list(self.probabilities[head].shape)
                raise ValueError(f"probabilities of {head!r} are {shape}, but there are {len(names)} class names")
        heads = self.probabilities.keys()
        if self.classes.keys() != heads or (self.labels and not heads <= self.labels.keys()):
            raise ValueError(
                f"there are probabilities for {sorted(heads)}, class names for {sorted(self.classes)} and labels for "
                f"{sorted(self.labels)}; all must be for the same heads, or there are no labels at all"
            )

    @property
    def model(self) -> str:
        """The model's name in tables and reports."""
        return str(self.about.get("model", "CAST"))

    @property
    def compositional(self) -> bool:
        """Whether actions are pairs of verb and noun."""
        return {"verb", "noun"} <= set(self.probabilities)

    def guesses(self, head: str) -> Tensor:
        """int64 [samples], the best class of a head."""
        return self.probabilities[head].argmax(1)

    def hits(self, head: str) -> Tensor:
        """bool [samples], whether the best guess is right. For `action` of a compositional model verb and noun must be
        right.
        """
        if head == "action" and self.compositional:
            return self.hits("verb") & self.hits("noun")
        return self.guesses(head) == self.labels[head]

    def aligned_to(self, other: Predictions, name: str) -> Predictions:
        """The same predictions in the order of `other`'s samples.

        Raises:
            ValueError: the samples, labels or classes differ from those of `other`; the message says how.
        """
        mine, theirs = set(self.videos), set(other.videos)
        if mine != theirs:
            lacks, extra = sorted(theirs - mine), sorted(mine - theirs)
            raise ValueError(
                f"{name} was not made on the same videos: it lacks {len(lacks)} ({', '.join(lacks[:3])}) "
                f"and has {len(extra)} others ({', '.join(extra[:3])})"
            )
        place = {video: number for number, video in enumerate(self.videos)}
        order = torch.tensor([place[video] for video in other.videos])

        def sort(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {head: tensor[order] for head, tensor in tensors.items()}

        if other.labels and not self.labels:
            raise ValueError(f"{name} was made without labels: compare files of one data set")
        for head in self.classes.keys() & other.classes.keys():
            ours, wanted = len(self.classes[head]), len(other.classes[head])
            if ours != wanted:
                raise ValueError(f"{name} has {ours} classes for {head!r}, not {wanted}: compare files of one data set")
        labels = sort(self.labels)
        for head in labels.keys() & other.labels.keys():
            if not torch.equal(labels[head], other.labels[head]):
                raise ValueError(f"{name} was made with other labels for {head!r}: compare files of one data set")
        return Predictions(
            other.videos, sort(self.probabilities), labels, sort(self.views), self.classes, self.about, other.subsets
        )  # fmt: skip


def write_predictions(path: PathLike, predictions: Predictions) -> None:
    """Write a .jsonl or .parquet file, whole or not at all.

    Raises:
        ValueError: another suffix.
        MissingExtraError: Parquet without pyarrow; the message has the command that installs it.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        write_bytes(path, _to_parquet(predictions))
    elif path.suffix == ".jsonl":
        lines = [json_line(_header(predictions)), *map(json_line, _records(predictions))]
        write_text(path, "".join(lines))
    else:
        raise ValueError(f"{path}: predictions go into .jsonl or .parquet files, not {path.suffix or 'no suffix'!r}")


def read_predictions(path: PathLike) -> Predictions:
    """Read a file of :func:`write_predictions`; probabilities keep their bits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or a damaged one.
        MissingExtraError: Parquet without pyarrow.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such predictions file; {_HINT}")
    try:
        return _from_parquet(path) if path.suffix == ".parquet" else _from_jsonl(path)
    except (KeyError, TypeError, ValueError) as error:  # a field is missing or has another type
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: is no predictions file, or a damaged one ({what}); {_HINT}") from None


def _from_jsonl(path: Path) -> Predictions:
    header, *records = [json.loads(line) for line in text_lines(path.read_text(encoding="utf-8-sig"))]
    _check_header(header)
    return from_records(records, header["classes"], header["about"])


def from_records(
    records: Sequence[Mapping[str, Any]], classes: Mapping[str, Sequence[str]], about: Mapping[str, Any]
) -> Predictions:
    """Records of :func:`record` -> predictions."""

    def column(field: str, dtype: torch.dtype) -> dict[str, Tensor]:
        heads = records[0][field] if records else ()
        return {head: torch.tensor([record[field][head] for record in records], dtype=dtype) for head in heads}

    return Predictions(
        [record["video"] for record in records],
        column("probabilities", torch.float32),
        column("labels", torch.int64),
        column("views", torch.int64),
        classes,
        about,
    )


def record(
    video: str, labels: Mapping[str, int], probabilities: Mapping[str, Tensor], views: Mapping[str, Tensor]
) -> dict[str, Any]:
    """A sample as a JSON object; probabilities [classes], views [views] by head."""
    return {
        "video": video,
        "labels": {head: int(label) for head, label in labels.items()},
        "views": {head: guesses.tolist() for head, guesses in views.items()},
        "probabilities": {head: _shortest(values) for head, values in probabilities.items()},
    }


def json_line(value: Any) -> str:
    """A JSON object in one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"


def _shortest(values: Tensor) -> list[float]:
    """The shortest decimals that give the same float32: half the digits of a double's."""
    return [float(str(value)) for value in values.float().numpy()]


def _header(predictions: Predictions) -> dict[str, Any]:
    classes = {head: list(names) for head, names in predictions.classes.items()}
    return {"format": _FORMAT, "about": dict(predictions.about), "classes": classes}


def _check_header(header: object) -> None:
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError("its first line is not that of a predictions file")


def _records(predictions: Predictions) -> Iterable[dict[str, Any]]:
    for number, video in enumerate(predictions.videos):
        yield record(
            video,
            {head: int(label[number]) for head, label in predictions.labels.items()},
            {head: values[number] for head, values in predictions.probabilities.items()},
            {head: guesses[number] for head, guesses in predictions.views.items()},
        )


def _to_parquet(predictions: Predictions) -> bytes:
    arrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")

    def rows(values: Tensor) -> Any:
        return arrow.FixedSizeListArray.from_arrays(arrow.array(values.flatten().numpy()), values.shape[1])

    columns = {"video": arrow.array(list(predictions.videos))}
    columns |= {f"label_{head}": arrow.array(label.numpy()) for head, label in predictions.labels.items()}
    columns |= {f"views_{head}": rows(guesses) for head, guesses in predictions.views.items()}
    columns |= {f"probability_{head}": rows(values.float()) for head, values in predictions.probabilities.items()}
    header = json.dumps(_header(predictions))
    table = arrow.table(columns).replace_schema_metadata({_FORMAT: header})
    sink = arrow.BufferOutputStream()
    parquet.write_table(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _from_parquet(path: Path) -> Predictions:
    arrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"as Parquet: {error}") from None
    header = json.loads((table.schema.metadata or {}).get(_FORMAT.encode(), b"null"))
    _check_header(header)

    def column(prefix: str) -> dict[str, Tensor]:
        names = [name for name in table.column_names if name.startswith(prefix)]
        return {name.removeprefix(prefix): _tensor(table.column(name).combine_chunks()) for name in names}

    return Predictions(
        table.column("video").to_pylist(),
        column("probability_"),
        column("label_"),
        column("views_"),
        header["classes"],
        header["about"],
    )


def _tensor(array: Any) -> Tensor:
    width = getattr(array.type, "list_size", None)
    values = (array if width is None else array.flatten()).to_numpy(zero_copy_only=False)
    tensor = torch.from_numpy(np.array(values))
    return tensor if width is None else tensor.view(-1, width)
