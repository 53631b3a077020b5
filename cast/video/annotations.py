"""Annotation files: which videos there are and what they show.

Two published layouts, both without a header line:

- compositional (EPIC-Kitchens-100): `video_id,verb,noun`, the file is `<video_id>.mp4`;
- one label (Kinetics-400, Something-Something V2): `name.mp4 label`, separated by white space.

Labels are class indices from 0. Blank lines are skipped. A new layout is one more reader function that returns
a list of `Sample`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Sample:
    """One video file and its labels, head name -> class index."""

    path: Path
    labels: Mapping[str, int]


def read_compositional(
    annotations: PathLike, videos: PathLike, classes: Mapping[str, int] | None = None
) -> list[Sample]:
    """Samples of a `video_id,verb,noun` file, with labels `verb` and `noun`.

    Args:
        annotations: the annotation file.
        videos: the directory of the video files.
        classes: number of classes by head, to check the labels against.

    Raises:
        ValueError: the file is missing, empty or has a line that doesn't fit; the message names file and line.
    """

    def parse(line: str) -> tuple[str, dict[str, str]]:
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 3 or not parts[0]:
            raise ValueError(f"expected 'video_id,verb,noun', got {line!r}")
        return f"{parts[0]}.mp4", {"verb": parts[1], "noun": parts[2]}

    return _read(annotations, videos, classes, parse)


def read_single(
    annotations: PathLike, videos: PathLike, classes: Mapping[str, int] | None = None, head: str = "action"
) -> list[Sample]:
    """Samples of a `name.mp4 label` file, with one label called `head`.

    Args:
        annotations: the annotation file.
        videos: the directory of the video files.
        classes: number of classes by head, to check the labels against.
        head: name of the label.

    Raises:
        ValueError: the file is missing, empty or has a line that doesn't fit; the message names file and line.
    """

    def parse(line: str) -> tuple[str, dict[str, str]]:
        parts = line.rsplit(maxsplit=1)
        if len(parts) != 2:
            raise ValueError(f"expected 'name.mp4 label', got {line!r}")
        return parts[0], {head: parts[1]}

    return _read(annotations, videos, classes, parse)


def _read(
    annotations: PathLike,
    videos: PathLike,
    classes: Mapping[str, int] | None,
    parse: Callable[[str], tuple[str, dict[str, str]]],
) -> list[Sample]:
    samples = []
    for number, line in _lines(annotations):
        try:
            name, words = parse(line)
            labels = {head: _label(head, word, classes) for head, word in words.items()}
        except ValueError as error:
            raise ValueError(f"{os.fspath(annotations)}:{number}: {error}") from None
        samples.append(Sample(Path(videos) / name, labels))
    if not samples:
        raise ValueError(f"{os.fspath(annotations)}: has no annotations")
    return samples


def _lines(annotations: PathLike) -> Iterator[tuple[int, str]]:
    try:
        text = Path(annotations).read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(annotations)}: no such annotation file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(annotations)}: not a text file ({error})") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def _label(head: str, word: str, classes: Mapping[str, int] | None) -> int:
    try:
        label = int(word)
    except ValueError:
        raise ValueError(f"{head} must be a class index, got {word!r} (a header line is not allowed)") from None
    count = None if classes is None else classes.get(head)
    if classes is not None and count is None:
        raise ValueError(f"the file has labels for {head!r}, but classes are given for {sorted(classes)}")
    if label < 0 or (count is not None and label >= count):
        raise ValueError(f"{head} is {label}; allowed are 0 to {'...' if count is None else count - 1}")
    return label
