"""Annotation files: lists of videos and their labels.

Two published layouts, both without a header line and with labels as class indices from 0:

- compositional (EPIC-Kitchens-100): `video_id,verb,noun`, the file is `<video_id>.mp4`;
- one label (Kinetics-400, Something-Something V2): `name.mp4 label`, separated by blanks or tabs. The lists of frame
  folders by older tools are also read: `name pictures label`.

Blank lines are skipped. Names may have quotes around them; names that begin or end with a blank need them. A challenge
does not publish its test labels: a test set's file may have names only. `cast.video.tables` reads files with a header.
A new layout is one more reader function that returns a list of `Sample`.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cast.ground.files import text_lines
from cast.video.files import VIDEO_ENDINGS

PathLike = str | os.PathLike[str]
Layout = Literal["compositional", "single", "csv"]


@dataclass(frozen=True)
class Sample:
    """One video, a file or a folder of frames, and its labels, head name -> class index.

    `line` is its line in the annotation file, from 1. `pictures` is the number of pictures in the folder that the file
    states, or None.
    """

    path: Path
    labels: Mapping[str, int]
    line: int = field(default=0, compare=False)
    pictures: int | None = field(default=None, compare=False)


#: Separators of words in a line. Other white space of Unicode may be part of a name.
BLANKS = " \t"
_LAST_WORD = re.compile(r"(.*[^ \t])[ \t]+([^ \t]+)")


def find_video(videos: PathLike, name: str) -> Path:
    """The path of a video in an annotation file: the file with that name, or with `.mp4` added.

    If the name has no ending of a video (`Cook.Cut_p02` has none) and there is no such `.mp4`, the file or folder of
    frames with exactly this name is taken.
    """
    path = Path(videos) / name
    if path.suffix.lower() in VIDEO_ENDINGS:
        return path
    file = Path(f"{path}.mp4")
    return path if os.path.exists(path) and not os.path.exists(file) else file


def read_compositional(
    annotations: PathLike, videos: PathLike, classes: Mapping[str, int] | None = None, labelled: bool = True
) -> list[Sample]:
    """Samples of a `video_id,verb,noun` file, with labels `verb` and `noun`.

    Args:
        annotations: the annotation file.
        videos: the directory of the video files.
        classes: number of classes by head, to check the labels against.
        labelled: whether labels are required; otherwise all lines may have only `video_id`.

    Raises:
        ValueError: the file is missing, empty or has a line that doesn't fit; the message names file and line.
    """

    def parse(line: str) -> _Line:
        parts = _cells(line)
        if len(parts) != 3 or not parts[0]:
            raise ValueError(f"expected 'video_id,verb,noun', got {line!r}")
        return _Line(parts[0], {"verb": parts[1], "noun": parts[2]})

    def bare(line: str) -> str | None:
        parts = _cells(line)
        return parts[0] if len(parts) == 1 else None

    return _read(annotations, videos, classes, parse, None if labelled else bare)


def read_single(
    annotations: PathLike,
    videos: PathLike,
    classes: Mapping[str, int] | None = None,
    head: str = "action",
    labelled: bool = True,
) -> list[Sample]:
    """Samples of a `name.mp4 label` file, with one label called `head`; or of a `name pictures label` file.

    Args:
        annotations: the annotation file.
        videos: the directory of the video files.
        classes: number of classes by head, to check the labels against.
        head: name of the label.
        labelled: whether labels are required; otherwise all lines may have only `name.mp4`.

    Raises:
        ValueError: the file is missing, empty or has a line that doesn't fit; the message names file and line.
    """

    def parse(line: str) -> _Line:
        parts = _LAST_WORD.fullmatch(line)
        if parts is None:
            raise ValueError(f"expected 'name.mp4 label', got {line!r}")
        name, label = parts.groups()
        counted = _LAST_WORD.fullmatch(name)
        if counted and is_index(counted[2]):
            return _Line(_unquoted(counted[1]), {head: label}, int(counted[2]))
        return _Line(_unquoted(name), {head: label})

    def bare(line: str) -> str | None:
        parts = _LAST_WORD.fullmatch(line)  # a name may have spaces in it
        return None if is_index(parts[2] if parts else line) else _unquoted(line)

    return _read(annotations, videos, classes, parse, None if labelled else bare)


@dataclass(frozen=True)
class _Line:
    """The content of a line: the video's name, labels by head, and the number of pictures if the line states it."""

    name: str
    words: Mapping[str, str]
    pictures: int | None = None


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([trimmed(line, ",")]), [])
    except csv.Error as error:
        raise ValueError(f"no CSV ({error}): {line[:40]!r}...") from None


def trimmed(text: str, separator: str) -> str:
    """Rows without the blanks around their cells. Quoted cells keep theirs; `csv` cannot do this."""
    blanks = f"[{BLANKS.replace(separator, '')}]"
    begin, end = rf"(?:^|(?<={separator}))", rf"(?={separator}|$)"
    around = rf'{begin}{blanks}*("(?:[^"]|"")*"){blanks}*{end}|{begin}{blanks}+|{blanks}+{end}'
    return re.sub(around, lambda found: found[1] or "", text, flags=re.MULTILINE)


def _unquoted(name: str) -> str:
    """The name without quotes around it, if there are any; inside, a doubled quote means one."""
    mark = name[0]
    if mark in "\"'" and len(name) > 2 and name.endswith(mark):
        return name[1:-1].replace(mark * 2, mark)
    return name


def _read(
    annotations: PathLike,
    videos: PathLike,
    classes: Mapping[str, int] | None,
    parse: Callable[[str], _Line],
    bare: Callable[[str], str | None] | None,
) -> list[Sample]:
    """Samples by `parse`, line -> name and labels; or by `bare`, line -> name, if the first line has no labels."""
    lines, samples = list(_lines(annotations)), []
    if bare is not None and lines and bare(lines[0][1]) is not None:
        return _read_names(annotations, videos, lines, bare)
    for number, line in lines:
        try:
            said = parse(line)
            labels = {head: _label(head, word, classes) for head, word in said.words.items()}
        except ValueError as error:
            raise ValueError(f"{os.fspath(annotations)}:{number}: {error}") from None
        samples.append(Sample(find_video(videos, said.name), labels, number, said.pictures))
    if not samples:
        raise ValueError(f"{os.fspath(annotations)}: has no annotations")
    return samples


def _read_names(
    annotations: PathLike, videos: PathLike, lines: Sequence[tuple[int, str]], bare: Callable[[str], str | None]
) -> list[Sample]:
    samples = []
    for number, line in lines:
        if (name := bare(line)) is None:
            where = f"{os.fspath(annotations)}:{number}"
            raise ValueError(f"{where}: {line!r} has labels, line {lines[0][0]} has none; all lines must, or none")
        samples.append(Sample(find_video(videos, name), {}, number))
    return samples


def read_text(path: PathLike) -> str:
    """The text of an annotation or class-name file.

    Raises:
        ValueError: there is no such file, or it is not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark first
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(path)}: no such file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)}: not a text file in UTF-8 ({error}); save it as one") from None


def _lines(annotations: PathLike) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text_lines(read_text(annotations)), start=1):
        if words := line.strip(BLANKS):
            yield number, words


def _label(head: str, word: str, classes: Mapping[str, int] | None) -> int:
    if not is_index(word.removeprefix("-")):  # int() takes 1_0 for 10
        raise ValueError(f"{head} must be a class index, got {word!r} (a header line is not allowed)")
    label = int(word)
    count = None if classes is None else classes.get(head)
    if classes is not None and count is None:
        raise ValueError(f"the file has labels for {head!r}, but classes are given for {sorted(classes)}")
    if label < 0 or (count is not None and label >= count):
        raise ValueError(f"{head} is {label}; allowed are 0 to {'...' if count is None else count - 1}")
    return label


def check_once(annotations: PathLike, samples: Sequence[Sample]) -> None:
    """Check that every line of an annotation file has a different video.

    Raises:
        ValueError: a video occurs twice; the message names the first such line and counts the others.
    """
    first: dict[str, Sample] = {}
    again = []
    for sample in samples:
        if first.setdefault(os.path.normpath(sample.path), sample) is not sample:
            again.append(sample)
    if again:
        other = first[os.path.normpath(again[0].path)]
        how = "the same labels as" if again[0].labels == other.labels else "other labels than"
        more = f", and {len(again) - 1} more lines repeat videos" if len(again) > 1 else ""
        raise ValueError(
            f"{os.fspath(annotations)}:{again[0].line}: names {again[0].path.name} again, with {how} line {other.line}"
            f"{more}: a line stands for a whole video, so remove all but one. If lines are segments of a video, cut "
            "each into its own file first, as EPIC-Kitchens' <narration_id>.mp4"
        )


def guess_layout(text: str) -> Layout:
    """The layout of an annotation file, from its first line."""
    line = next((line.strip(BLANKS) for line in text_lines(text) if line.strip(BLANKS)), "")
    try:
        cells = _cells(line)
    except ValueError:
        return "csv"  # its reader names the fault
    if len(cells) == 3 and all(map(is_index, cells[1:])):
        return "compositional"
    words = _LAST_WORD.fullmatch(line)
    return "single" if words and is_index(words[2]) else "csv"


def is_index(word: str) -> bool:
    return word.isascii() and word.isdigit()
