"""The skip list: unusable videos with their faults, from `cast data check` or a person. Training leaves them out."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cast.ground.files import printable
from cast.video.annotations import PathLike, read_text

#: Its name in the data set's directory.
DEFAULT_NAME = "skip.csv"
#: The fault of a video with fewer frames than a clip. Tests still use it.
SHORT = "short"
#: Faults that `cast data check` reports. Lines with another fault are a person's, and a check keeps them.
FAULTS = ("missing", "empty", "undecodable", SHORT)
#: The fault of a line that a person added.
BY_HAND = "by hand"


class Skip(NamedTuple):
    """One unusable video. `where` is annotation file and line.

    `path` is relative to the data set's directory, escaped by `cast.ground.files.printable`.
    """

    path: str
    fault: str
    where: str
    detail: str


def write_skips(path: PathLike, skips: Iterable[Skip]) -> None:
    """Write a skip list; an interrupted run leaves the previous one whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Skip._fields)
    writer.writerows([printable(cell) for cell in skip] for skip in skips)
    part = Path(f"{os.fspath(path)}.part")
    part.write_text(text.getvalue(), encoding="utf-8")
    os.replace(part, path)


def read_rows(path: PathLike) -> list[Skip]:
    """The lines of a skip list. Cells missing in a line are empty; a missing fault is `BY_HAND`.

    Raises:
        ValueError: the file is missing or is no skip list.
    """
    rows = csv.DictReader(io.StringIO(read_text(path)))
    if rows.fieldnames is None or not {"path", "fault"} <= set(rows.fieldnames):
        raise ValueError(f"{os.fspath(path)}: is no skip list; its header must have path and fault: {rows.fieldnames}")
    return [Skip(row["path"], row["fault"] or BY_HAND, row.get("where") or "", row.get("detail") or "") for row in rows]


def read_skips(path: PathLike) -> dict[str, str]:
    """Path of each video to leave out -> its fault. Errors as in :func:`read_rows`."""
    return {row.path: row.fault for row in read_rows(path)}


def how_to_skip(video: PathLike, root: PathLike, skip_list: str) -> str:
    """Advice about a video that a training can't read; `root` and `skip_list` as in the data settings."""
    file = Path(root) / (DEFAULT_NAME if skip_list in ("auto", "none") else skip_list)
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow([printable(os.path.relpath(video, root)), BY_HAND])
    header = "" if file.is_file() else ", below the header path,fault,"
    chosen = ", set data.skip_list=auto" if skip_list == "none" else ""
    return (
        f"to leave it out, add the line {line.getvalue()} to {file}{header}{chosen} and go on with --resume; "
        "cast data check --every-frame finds all such videos"
    )
