"""How a model's clips were made: sampling.json beside a checkpoint, {"sampling": "dense", "short_side": 320}.

A model trained on frames four apart is less accurate on frames spread over a whole video. So a test must know the
training's sampling, and also whether pictures were shrunk first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

from cast.ground.files import read_json, write_json

#: Frames spread over the whole video (EPIC-Kitchens-100, Something-Something V2), or about four apart (Kinetics-400).
Sampling = Literal["uniform", "dense"]

#: Its name in a checkpoint's directory.
SAMPLING = "sampling.json"


def read_sampling(directory: str | os.PathLike[str]) -> Sampling | None:
    """The sampling in a directory's `sampling.json`; None if it names none, or if there is no such file.

    Raises:
        ValueError: the file is no JSON, or names an unknown sampling.
    """
    found = _read(directory).get("sampling")
    for sampling in get_args(Sampling):
        if found == sampling:
            return sampling
    return None


def read_short_side(directory: str | os.PathLike[str]) -> int | None:
    """The size in pixels to which the training shrank larger pictures, from `sampling.json` in a directory.

    Returns:
        None if pictures were not shrunk: the file has no such entry (earlier versions wrote none), or is missing.

    Raises:
        ValueError: as :func:`read_sampling`, or the entry is no whole number above 0.
    """
    found: int | None = _read(directory).get("short_side")
    return found


def _read(directory: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(directory) / SAMPLING
    if not path.exists():
        return {}
    content = read_json(path)
    if isinstance(content, dict) and content.keys() & {"sampling", "short_side"}:
        sampling, side = content.get("sampling"), content.get("short_side")
        if sampling in (None, *get_args(Sampling)) and (side is None or (type(side) is int and side > 0)):
            return content
    allowed = " or ".join(f'{{"sampling": "{sampling}"}}' for sampling in get_args(Sampling))
    raise ValueError(
        f'{path}: must have {allowed}, and "short_side" in pixels if pictures were shrunk; remove the file if '
        "neither is known"
    )


def as_json(sampling: Sampling | None, short_side: int | None = None) -> dict[str, str | int] | None:
    """The content of `sampling.json` without the entries that are None; None if there are no others."""
    known = {"sampling": sampling, "short_side": short_side}
    return {name: value for name, value in known.items() if value is not None} or None


def write_sampling(directory: str | os.PathLike[str], sampling: Sampling | None, short_side: int | None = None) -> None:
    """Write `sampling.json` into a directory; a kill leaves the old file or the new one."""
    write_json(Path(directory) / SAMPLING, as_json(sampling, short_side))
