"""Class names: from the files that data sets publish, or from the annotations themselves."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cast.ground.files import text_lines
from cast.video.annotations import PathLike, read_text

#: Files of class names to look for in a data set's directory, head -> names of the file.
PUBLISHED = {
    "verb": ("EPIC_100_verb_classes.csv",),
    "noun": ("EPIC_100_noun_classes.csv", "EPIC_100_noun_classes_v2.csv"),
    "action": ("classes.txt", "kinetics_400_labels.csv", "labels.json", "something-something-v2-labels.json"),
}
#: A file with names for all heads; looked for first.
ALL_HEADS = "classes.json"


def read_classes(path: PathLike, head: str) -> list[str]:
    """The class names of `head`, by index.

    The file's ending gives the format. `.json`: a list of names, `{"head": [names]}`, or `{"name": index}` as in
    Something-Something V2. `.csv`: a header with `id` and `key` (EPIC-Kitchens-100), `name`, `label` or `class`. Any
    other text has one name a line.

    Raises:
        ValueError: the file is missing, of none of these formats, or lacks an index; the message names the file.
    """
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".json":
            names = _from_json(read_text(path), head)
        elif suffix == ".csv":
            names = _from_csv(read_text(path))
        else:
            names = [line.strip() for line in text_lines(read_text(path)) if line.strip()]
        _check(names)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(os.fspath(path)) else f"{os.fspath(path)}: {text}") from None
    return names


def find_classes(root: Path, heads: Sequence[str]) -> dict[str, list[str]]:
    """Names by head from the files in `root`; empty unless there is a file for every head."""
    paths = {head: find_file(root, head) for head in heads}
    found = {head: read_classes(path, head) for head, path in paths.items() if path}
    return found if len(found) == len(paths) else {}


def find_file(root: Path, head: str) -> Path | None:
    """The file in `root` that names the classes of `head`; None if there is none."""
    names = (ALL_HEADS, *PUBLISHED.get(head, ()))
    return next((root / name for name in names if (root / name).is_file()), None)


def _from_json(text: str, head: str) -> list[str]:
    data = json.loads(text)
    if isinstance(data, Mapping) and isinstance(data.get(head), list):
        data = data[head]
    if isinstance(data, Mapping) and data and all(str(value).isdigit() for value in data.values()):
        return _by_index({int(index): name for name, index in data.items()}, len(data))
    if not isinstance(data, list):
        raise ValueError(f'has no names for {head!r}; write {{"{head}": ["first name", ...]}}')
    return [str(name) for name in data]


def _from_csv(text: str) -> list[str]:
    rows = list(csv.DictReader(io.StringIO(text), skipinitialspace=True))
    titles = list(rows[0]) if rows else []
    column = next((name for name in ("key", "name", "label", "class") if name in titles), None)
    if "id" not in titles or column is None:
        raise ValueError(f"the header must have 'id' and 'key' (or name, label, class); it has {titles}")
    return _by_index({int(row["id"]): row[column] for row in rows}, len(rows))


def _by_index(names: Mapping[int, str], count: int) -> list[str]:
    missing = sorted(set(range(count)) - names.keys())
    if missing:
        raise ValueError(f"has {count} names, but none for index {missing[0]}")
    return [names[index] for index in range(count)]


def _check(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("has no class names")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"names class {twice[0]!r} twice")
