"""Annotation files: which videos there are and what they show.

Two published layouts, both without a header line and with labels as class indices from 0:

- compositional (EPIC-Kitchens-100): `video_id,verb,noun`, the file is `<video_id>.mp4`;
- one label (Kinetics-400, Something-Something V2): `name.mp4 label`, separated by blanks or tabs. The older tools'
  lists of frame folders are read too: `name pictures label`.

And a general one: a CSV with a header, a column for the file and one label or a verb and a noun, as class indices
or as class names. Blank lines are skipped. Names may stand in quotes, and those with blanks at an end must. Of a test
set, whose labels a challenge keeps to itself, the first two layouts may have the names alone. A new layout is one more
reader function that returns a list of `Sample`.
"""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cast.files import text_lines
from cast.video.folder import VIDEO_ENDINGS

PathLike = str | os.PathLike[str]
Layout = Literal["compositional", "single", "csv"]


@dataclass(frozen=True)
class Sample:
    """One video, a file or a folder of frames, and its labels, head name -> class index.

    `line` is where the annotation file says so, from 1; `pictures` is how many it says that the folder holds, if it
    does.
    """

    path: Path
    labels: Mapping[str, int]
    line: int = field(default=0, compare=False)
    pictures: int | None = field(default=None, compare=False)


#: Names that the columns of a CSV with a header may have, by what they hold; small letters, first found wins.
COLUMNS = {
    "path": ("path", "video", "file", "filename", "video_path", "name", "narration_id", "video_id", "id"),
    "verb": ("verb_class", "verb"),
    "noun": ("noun_class", "noun"),
    "action": ("label", "action", "class", "category"),
}

#: Columns that make EPIC-Kitchens' lines segments of a longer video.
_SEGMENT = ("start_frame", "stop_frame", "start_timestamp", "stop_timestamp")

#: What parts the words of a line and may surround them. Other white space of Unicode's may be part of a name.
_BLANKS = " \t"
_LAST_WORD = re.compile(r"(.*[^ \t])[ \t]+([^ \t]+)")


def find_video(videos: PathLike, name: str) -> Path:
    """Where a video of an annotation file lies: the file with that name, or with `.mp4` after it.

    Where a name does not end as a video's does (`Cook.Cut_p02` does not) and there is no such `.mp4`, the file or the
    folder of frames with that very name is taken.
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
        labelled: whether there must be labels; otherwise all lines may be `video_id` alone.

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
        labelled: whether there must be labels; otherwise all lines may be `name.mp4` alone.

    Raises:
        ValueError: the file is missing, empty or has a line that doesn't fit; the message names file and line.
    """

    def parse(line: str) -> _Line:
        parts = _LAST_WORD.fullmatch(line)
        if parts is None:
            raise ValueError(f"expected 'name.mp4 label', got {line!r}")
        name, label = parts.groups()
        counted = _LAST_WORD.fullmatch(name)
        if counted and _is_index(counted[2]):
            return _Line(_unquoted(counted[1]), {head: label}, int(counted[2]))
        return _Line(_unquoted(name), {head: label})

    def bare(line: str) -> str | None:
        parts = _LAST_WORD.fullmatch(line)  # a name may have spaces in it
        return None if _is_index(parts[2] if parts else line) else _unquoted(line)

    return _read(annotations, videos, classes, parse, None if labelled else bare)


@dataclass(frozen=True)
class _Line:
    """What a line says: the video's name, labels by head, and how many pictures its folder has, if it says so."""

    name: str
    words: Mapping[str, str]
    pictures: int | None = None


def _cells(line: str) -> list[str]:
    return [cell.strip(_BLANKS) for cell in next(csv.reader([line], skipinitialspace=True))]


def _unquoted(name: str) -> str:
    """Without the quotes around it, if there are any; in them a quote is written twice."""
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
        return Path(path).read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(path)}: no such file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)}: not a text file in UTF-8 ({error}); save it as one") from None


def _lines(annotations: PathLike) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text_lines(read_text(annotations)), start=1):
        if words := line.strip(_BLANKS):
            yield number, words


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


def check_once(annotations: PathLike, samples: Sequence[Sample]) -> None:
    """See that every line of an annotation file has a video of its own.

    Raises:
        ValueError: a video is there twice; the message names the first such line and counts the others.
    """
    first: dict[str, Sample] = {}
    again = []
    for sample in samples:
        if first.setdefault(os.path.normpath(sample.path), sample) is not sample:
            again.append(sample)
    if again:
        other = first[os.path.normpath(again[0].path)]
        how = "the same labels as" if again[0].labels == other.labels else "other labels than"
        more = f", and {len(again) - 1} more lines do the like" if len(again) > 1 else ""
        raise ValueError(
            f"{os.fspath(annotations)}:{again[0].line}: names {again[0].path.name} again, with {how} line {other.line}"
            f"{more}: a line stands for a whole video, so remove all but one. Segments of a video are cut into files "
            "of their own first, as EPIC-Kitchens' <narration_id>.mp4"
        )


def guess_layout(text: str) -> Layout:
    """How an annotation file is written, by its first line."""
    line = next((line.strip(_BLANKS) for line in text_lines(text) if line.strip(_BLANKS)), "")
    cells = _cells(line)
    if len(cells) == 3 and all(map(_is_index, cells[1:])):
        return "compositional"
    words = _LAST_WORD.fullmatch(line)
    return "single" if words and _is_index(words[2]) else "csv"


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
            samples.append(Sample(find_video(videos, name), labels, line))
        return samples


def read_table(annotations: PathLike, columns: Mapping[str, str] | None = None, labelled: bool = True) -> Table:
    """Read a CSV with a header: a column for the file, and `verb` and `noun` or one label.

    The separator is a comma, semicolon or tab, whichever the header has. Where the videos lie: see :func:`find_video`.

    Args:
        annotations: the annotation file.
        columns: what a column holds ("path", "verb", "noun", "action", or another head) -> its name in the header;
            what is not named is found by the names in `COLUMNS`.
        labelled: whether there must be labels; otherwise a table without any has no `heads`.

    Raises:
        ValueError: the file is missing or empty, lacks a column, or has a line that doesn't fit.
    """
    where = os.fspath(annotations)
    text = read_text(annotations)
    header = text_lines(text)[0]
    separator = next((mark for mark in ",;\t" if mark in header), ",")
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    titles = [title.strip() for title in next(reader, [])]
    places = _columns(where, titles, columns or {}, labelled)
    segment = next((title for title in _SEGMENT if title in titles), None)
    if segment and titles[places["path"]] == "video_id":
        raise ValueError(
            f"{where}: its lines are segments ({segment}) of the videos that video_id names, but they are read whole: "
            "cut each segment into a file or a folder of its own, and name that in a column narration_id or path"
        )
    heads = tuple(role for role in places if role != "path")
    rows = []
    for cells in _rows(where, reader):
        if len(cells) != len(titles):
            raise ValueError(f"{where}:{reader.line_num}: has {len(cells)} cells, the header {len(titles)}")
        values = {role: cells[place].strip(_BLANKS if role == "path" else None) for role, place in places.items()}
        if empty := [titles[places[role]] for role, value in values.items() if not value]:
            raise ValueError(f"{where}:{reader.line_num}: column {empty[0]!r} is empty")
        if any("\n" in value for value in values.values()):
            raise ValueError(f"{where}:{reader.line_num}: a cell has several lines; is a quote before it left open?")
        rows.append((reader.line_num, values.pop("path"), values))
    if not rows:
        raise ValueError(f"{where}: has no annotations")
    return Table(annotations, tuple(rows), heads)


def _rows(where: str, reader: Any) -> Iterator[list[str]]:
    """The rows of a `csv.reader` that have anything in them."""
    try:
        yield from (cells for cells in reader if any(cell.strip() for cell in cells))
    except csv.Error as error:
        raise ValueError(f"{where}:{reader.line_num}: no CSV from here on ({error}); is a quote left open?") from None


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
