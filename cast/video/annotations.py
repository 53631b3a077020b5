"""Annotation files: which videos there are and what they show.

Two published layouts, both without a header line and with labels as class indices from 0:

- compositional (EPIC-Kitchens-100): `video_id,verb,noun`, the file is `<video_id>.mp4`;
- one label (Kinetics-400, Something-Something V2): `name.mp4 label`, separated by white space.

And a general one: a CSV with a header, a column for the file and one label or a verb and a noun, as class indices
or as class names. Blank lines are skipped. Of a test set, whose labels a challenge keeps to itself, the first two
layouts may have the names alone. A new layout is one more reader function that returns a list of `Sample`.
"""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Sample:
    """One video file and its labels, head name -> class index. `line` is where the annotation file says so, from 1."""

    path: Path
    labels: Mapping[str, int]
    line: int = field(default=0, compare=False)


#: Names that the columns of a CSV with a header may have, by what they hold; small letters, first found wins.
COLUMNS = {
    "path": ("path", "video", "file", "filename", "video_path", "name", "narration_id", "video_id", "id"),
    "verb": ("verb_class", "verb"),
    "noun": ("noun_class", "noun"),
    "action": ("label", "action", "class", "category"),
}


def read_compositional(
    annotations: PathLike, videos: PathLike, classes: Mapping[str, int] | None = None, labelled: bool = True
) -> list[Sample]:
    """Samples of a `video_id,verb,noun` file, with labels `verb` and `noun`.

    Args:
        annotations: the annotation file.
        videos: the directory of the video files.
        classes: number of classes by head, to check the labels against.
        labelled: whether there must be labels; otherwise all lines may be `video_id` alone.

    Raises:
        ValueError: the file is missing, empty or has a line that doesn't fit; the message names file and line.
    """

    def parse(line: str) -> tuple[str, dict[str, str]]:
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 3 or not parts[0]:
            raise ValueError(f"expected 'video_id,verb,noun', got {line!r}")
        return f"{parts[0]}.mp4", {"verb": parts[1], "noun": parts[2]}

    def bare(line: str) -> str | None:
        return None if "," in line else f"{line}.mp4"

    return _read(annotations, videos, classes, parse, None if labelled else bare)


def read_single(
    annotations: PathLike,
    videos: PathLike,
    classes: Mapping[str, int] | None = None,
    head: str = "action",
    labelled: bool = True,
) -> list[Sample]:
    """Samples of a `name.mp4 label` file, with one label called `head`.

    Args:
        annotations: the annotation file.
        videos: the directory of the video files.
        classes: number of classes by head, to check the labels against.
        head: name of the label.
        labelled: whether there must be labels; otherwise all lines may be `name.mp4` alone.

    Raises:
        ValueError: the file is missing, empty or has a line that doesn't fit; the message names file and line.
    """

    def parse(line: str) -> tuple[str, dict[str, str]]:
        parts = line.rsplit(maxsplit=1)
        if len(parts) != 2:
            raise ValueError(f"expected 'name.mp4 label', got {line!r}")
        return parts[0], {head: parts[1]}

    def bare(line: str) -> str | None:
        return None if _is_index(line.split()[-1]) else line  # a name may have spaces in it

    return _read(annotations, videos, classes, parse, None if labelled else bare)


def _read(
    annotations: PathLike,
    videos: PathLike,
    classes: Mapping[str, int] | None,
    parse: Callable[[str], tuple[str, dict[str, str]]],
    bare: Callable[[str], str | None] | None,
) -> list[Sample]:
    """Samples by `parse`, line -> file and labels; or by `bare`, line -> file, if the first line has no labels."""
    lines, samples = list(_lines(annotations)), []
    if bare is not None and lines and bare(lines[0][1]) is not None:
        return _read_names(annotations, videos, lines, bare)
    for number, line in lines:
        try:
            name, words = parse(line)
            labels = {head: _label(head, word, classes) for head, word in words.items()}
        except ValueError as error:
            raise ValueError(f"{os.fspath(annotations)}:{number}: {error}") from None
        samples.append(Sample(Path(videos) / name, labels, number))
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
        samples.append(Sample(Path(videos) / name, {}, number))
    return samples


def read_text(path: PathLike) -> str:
    """The text of an annotation or class-name file.

    Raises:
        ValueError: there is no such file, or it is not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(path)}: no such file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)}: not a text file ({error})") from None


def _lines(annotations: PathLike) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_text(annotations).splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def _label(head: str, word: str, classes: Mapping[str, int] | None) -> int:
    if not _is_index(word.removeprefix("-")):  # int() takes 1_0 for 10
        raise ValueError(f"{head} must be a class index, got {word!r} (a header line is not allowed)")
    label = int(word)
    count = None if classes is None else classes.get(head)
    if classes is not None and count is None:
        raise ValueError(f"the file has labels for {head!r}, but classes are given for {sorted(classes)}")
    if label < 0 or (count is not None and label >= count):
        raise ValueError(f"{head} is {label}; allowed are 0 to {'...' if count is None else count - 1}")
    return label


@dataclass(frozen=True)
class Table:
    """A CSV with a header, before its labels are turned into class indices.

    Args:
        annotations: the file, for messages.
        rows: line number, file name and label words by head, one per video.
        heads: the label columns' heads.
    """

    annotations: PathLike
    rows: tuple[tuple[int, str, Mapping[str, str]], ...]
    heads: tuple[str, ...]

    def indexed(self, head: str) -> bool:
        """Whether all labels of `head` are written as numbers."""
        return all(_is_index(words[head]) for _, _, words in self.rows)

    def words(self, head: str) -> list[str]:
        """The different labels of `head`, sorted."""
        return sorted({words[head] for _, _, words in self.rows})

    def samples(self, videos: PathLike, names: Mapping[str, Sequence[str]]) -> list[Sample]:
        """The videos with class indices; a label is a name in `names[head]` or, where no label is one, an index.

        Raises:
            ValueError: a label is neither; the message names file and line.
        """
        indices = {head: {name: index for index, name in enumerate(names[head])} for head in self.heads}
        numbers = {
            head: self.indexed(head) and not all(word in indices[head] for word in self.words(head))
            for head in self.heads
        }
        samples = []
        for line, name, words in self.rows:
            labels = {}
            for head, word in words.items():
                label = int(word) if numbers[head] else indices[head].get(word, -1)
                if not 0 <= label < len(names[head]):
                    raise ValueError(f"{os.fspath(self.annotations)}:{line}: {_unknown(head, word, names[head])}")
                labels[head] = label
            samples.append(Sample(Path(videos) / name, labels, line))
        return samples


def read_table(annotations: PathLike, columns: Mapping[str, str] | None = None, labelled: bool = True) -> Table:
    """Read a CSV with a header: a column for the file, and `verb` and `noun` or one label.

    A file name without an ending gets `.mp4`. The separator is a comma, semicolon or tab, whichever the header has.

    Args:
        annotations: the annotation file.
        columns: what a column holds ("path", "verb", "noun", "action", or another head) -> its name in the header;
            what is not named is found by the names in `COLUMNS`.
        labelled: whether there must be labels; otherwise a table without any has no `heads`.

    Raises:
        ValueError: the file is missing or empty, lacks a column, or has a line that doesn't fit.
    """
    where = os.fspath(annotations)
    lines = read_text(annotations).splitlines()
    header = lines[0] if lines else ""
    separator = next((mark for mark in ",;\t" if mark in header), ",")
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    titles = [title.strip() for title in next(reader, [])]
    places = _columns(where, titles, columns or {}, labelled)
    heads = tuple(role for role in places if role != "path")
    rows = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(titles):
            raise ValueError(f"{where}:{reader.line_num}: has {len(cells)} cells, the header {len(titles)}")
        values = {role: cells[place].strip() for role, place in places.items()}
        if empty := [titles[places[role]] for role, value in values.items() if not value]:
            raise ValueError(f"{where}:{reader.line_num}: column {empty[0]!r} is empty")
        path = values.pop("path")
        rows.append((reader.line_num, path if Path(path).suffix else f"{path}.mp4", values))
    if not rows:
        raise ValueError(f"{where}: has no annotations")
    return Table(annotations, tuple(rows), heads)


def _columns(where: str, titles: list[str], given: Mapping[str, str], labelled: bool) -> dict[str, int]:
    """What the columns hold -> their places: the path first, then the heads."""
    if not labelled and not any(title in titles for role, title in given.items() if role != "path"):
        given = {role: title for role, title in given.items() if role == "path"}
    places = {}
    for role, title in given.items():
        if title not in titles:
            raise ValueError(f"{where}: has no column {title!r} for {role!r}; its header has {titles}")
        places[role] = titles.index(title)
    small = [title.lower() for title in titles]
    found = {
        role: next(small.index(name) for name in names if name in small)
        for role, names in COLUMNS.items()
        if any(name in small for name in names)
    }
    if "path" not in places and "path" in found:
        places["path"] = found["path"]
    if not places.keys() - {"path"}:
        pair = found.keys() & {"verb", "noun"}
        wanted = ("verb", "noun") if len(pair) == 2 else ("action",) if "action" in found else tuple(pair)
        places |= {role: found[role] for role in wanted if role in found}
    if "path" not in places or (labelled and len(places) < 2):
        raise ValueError(
            f"{where}: the header must have a column for the video ({', '.join(COLUMNS['path'][:4])}) and one for the "
            f"label ({', '.join(COLUMNS['action'])}) or a verb and a noun; it has {titles}. Else say which is which: "
            "columns: {path: ..., action: ...}"
        )
    return {"path": places.pop("path"), **places}


def _is_index(word: str) -> bool:
    return word.isascii() and word.isdigit()


def _unknown(head: str, word: str, names: Sequence[str]) -> str:
    if _is_index(word):
        return f"{head} is {word}; allowed are 0 to {len(names) - 1}"
    close = difflib.get_close_matches(word, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else f", for example {names[0]!r}" if names else ""
    return f"{head} {word!r} is none of the {len(names)} class names{hint}"
