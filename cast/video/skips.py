"""The skip list: videos that `cast data check` or a person found unusable, and why. Training leaves them out."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cast.ground.files import printable
from cast.video.annotations import PathLike, read_text

#: In the data set's directory.
DEFAULT_NAME = "skip.csv"
#: The fault of a video with fewer frames than a clip, which can be tested all the same.
SHORT = "short"
#: What `cast data check` finds. Lines with any other fault are a person's: a check keeps them.
FAULTS = ("missing", "empty", "undecodable", SHORT)
#: The fault of a line that a person has added.
BY_HAND = "by hand"


class Skip(NamedTuple):
    """One unusable video. `where` is annotation file and line.

    `path` is relative to the data set's directory, and escaped as `cast.ground.files.printable` does it.
    """

    path: str
    fault: str
    where: str
    detail: str


def write_skips(path: PathLike, skips: Iterable[Skip]) -> None:
    """Write a skip list; a run that is cut off leaves the previous one whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Skip._fields)
    writer.writerows([printable(cell) for cell in skip] for skip in skips)
    part = Path(f"{os.fspath(path)}.part")
    part.write_text(text.getvalue(), encoding="utf-8")
    os.replace(part, path)


def read_rows(path: PathLike) -> list[Skip]:
    """The lines of a skip list; cells that a line lacks are empty, and a fault that is not named is `BY_HAND`.

    Raises:
        ValueError: the file is missing or is no skip list.
    """
    rows = csv.DictReader(io.StringIO(read_text(path)))
    if rows.fieldnames is None or not {"path", "fault"} <= set(rows.fieldnames):
        raise ValueError(f"{os.fspath(path)}: is no skip list; its header must have path and fault: {rows.fieldnames}")
    return [Skip(row["path"], row["fault"] or BY_HAND, row.get("where") or "", row.get("detail") or "") for row in rows]


def read_skips(path: PathLike) -> dict[str, str]:
    """Path of each video to leave out -> what is wrong with it. Errors as in :func:`read_rows`."""
    return {row.path: row.fault for row in read_rows(path)}


def how_to_skip(video: PathLike, root: PathLike, skip_list: str) -> str:
    """What to do about a video that a training can't read; `root` and `skip_list` as in the data settings."""
    file = Path(root) / (DEFAULT_NAME if skip_list in ("auto", "none") else skip_list)
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow([printable(os.path.relpath(video, root)), BY_HAND])
    header = "" if file.is_file() else ", below the header path,fault,"
    chosen = ", set data.skip_list=auto" if skip_list == "none" else ""
    return (
        f"to leave it out, add the line {line.getvalue()} to {file}{header}{chosen} and go on with --resume; "
        "cast data check --every-frame finds all such videos"
    )
