"""Annotation files with a header: columns for the file, and for one label or a verb and a noun, as indices or names."""

from __future__ import annotations

import csv
import difflib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cast.ground.files import text_lines
from cast.video.annotations import PathLike, Sample, find_video, is_index, read_text, trimmed

#: Names of CSV columns by role; in small letters, the first match wins.
COLUMNS = {
    "path": ("path", "video", "file", "filename", "video_path", "name", "narration_id", "video_id", "id"),
    "verb": ("verb_class", "verb"),
    "noun": ("noun_class", "noun"),
    "action": ("label", "action", "class", "category"),
}

#: Columns that mark lines as segments of a longer video, in EPIC-Kitchens.
_SEGMENT = ("start_frame", "stop_frame", "start_timestamp", "stop_timestamp")


@dataclass(frozen=True)
class Table:
    """A CSV with a header. Labels are still words, not class indices.

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
        return all(is_index(words[head]) for _, _, words in self.rows)

    def words(self, head: str) -> list[str]:
        """The different labels of `head`, sorted."""
        return sorted({words[head] for _, _, words in self.rows})

    def samples(self, videos: PathLike, names: Mapping[str, Sequence[str]]) -> list[Sample]:
        """The videos with class indices. A label is a name in `names[head]`; if no label of a head is one, all are
        indices.

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

    The header's first comma, semicolon or tab is the separator. :func:`find_video` finds the videos.

    Args:
        annotations: the annotation file.
        columns: role ("path", "verb", "noun", "action", or another head) -> name in the header. The names in `COLUMNS`
            find the other roles.
        labelled: whether labels are required; otherwise a table may have none, and then has no `heads`.

    Raises:
        ValueError: the file is missing or empty, lacks a column, or has a line that doesn't fit.
    """
    where = os.fspath(annotations)
    text = read_text(annotations)
    header = next((line for line in text_lines(text) if line.strip()), "")
    separator = next((mark for mark in ",;\t" if mark in header), ",")
    reader = csv.reader(io.StringIO(trimmed(text, separator)), delimiter=separator)
    lines = _rows(where, reader)
    titles = [title.strip() for title in next(lines, [])]
    if not titles:
        raise ValueError(f"{where}: has no annotations")
    places = _columns(where, titles, columns or {}, labelled)
    segment = next((title for title in _SEGMENT if title in titles), None)
    if segment and titles[places["path"]] == "video_id":
        raise ValueError(
            f"{where}: its lines are segments ({segment}) of the videos that video_id names, but they are read whole: "
            "cut each segment into a file or a folder of its own, and name that in a column narration_id or path"
        )
    heads = tuple(role for role in places if role != "path")
    rows = []
    for cells in lines:
        if len(cells) != len(titles):
            raise ValueError(f"{where}:{reader.line_num}: has {len(cells)} cells, the header {len(titles)}")
        values = {role: cells[place] if role == "path" else cells[place].strip() for role, place in places.items()}
        if empty := [titles[places[role]] for role, value in values.items() if not value]:
            raise ValueError(f"{where}:{reader.line_num}: column {empty[0]!r} is empty")
        if any("\n" in value for value in values.values()):
            raise ValueError(f"{where}:{reader.line_num}: a cell has several lines; is a quote before it left open?")
        if below := [head for head in heads if values[head].startswith("-") and is_index(values[head][1:])]:
            raise ValueError(
                f"{where}:{reader.line_num}: {below[0]} is {values[below[0]]}; class indices count from 0. Leave out "
                "videos whose class is not known, or, in a test, the column of a label that is not known"
            )
        rows.append((reader.line_num, values.pop("path"), values))
    if not rows:
        raise ValueError(f"{where}: has no annotations")
    return Table(annotations, tuple(rows), heads)


def _rows(where: str, reader: Any) -> Iterator[list[str]]:
    """The rows of a `csv.reader` that are not empty."""
    try:
        yield from (cells for cells in reader if any(cell.strip() for cell in cells))
    except csv.Error as error:
        raise ValueError(f"{where}:{reader.line_num}: no CSV from here on ({error}); is a quote left open?") from None


def _columns(where: str, titles: list[str], given: Mapping[str, str], labelled: bool) -> dict[str, int]:
    """Role -> number of the column: the path first, then the heads."""
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
    if twice := [titles[place] for place in places.values() if titles.count(titles[place]) > 1]:
        raise ValueError(f"{where}: its header has {twice[0]!r} twice: {titles}; give the columns different names")
    return {"path": places.pop("path"), **places}


def _unknown(head: str, word: str, names: Sequence[str]) -> str:
    if is_index(word):
        return f"{head} is {word}; allowed are 0 to {len(names) - 1}"
    close = difflib.get_close_matches(word, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else f", for example {names[0]!r}" if names else ""
    return f"{head} {word!r} is none of the {len(names)} class names{hint}"
