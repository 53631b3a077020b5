"""The skip list: videos that `cast data check` found unusable, and why. Training leaves them out and says so."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cast.video.annotations import PathLike, read_text

#: In the data set's directory.
DEFAULT_NAME = "skip.csv"


class Skip(NamedTuple):
    """One unusable video. `path` is relative to the data set's directory, `where` is annotation file and line."""

    path: str
    fault: str
    where: str
    detail: str


def write_skips(path: PathLike, skips: Iterable[Skip]) -> None:
    """Write a skip list; a run that is cut off leaves the previous one whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Skip._fields)
    writer.writerows(skips)
    part = Path(f"{os.fspath(path)}.part")
    part.write_text(text.getvalue(), encoding="utf-8")
    os.replace(part, path)


def read_skips(path: PathLike) -> dict[str, str]:
    """Path of each video to leave out -> what is wrong with it.

    Raises:
        ValueError: the file is missing or is no skip list.
    """
    rows = csv.DictReader(read_text(path).splitlines())
    if rows.fieldnames is None or not {"path", "fault"} <= set(rows.fieldnames):
        raise ValueError(f"{os.fspath(path)}: is no skip list; its header must have path and fault: {rows.fieldnames}")
    return {row["path"]: row["fault"] for row in rows}
