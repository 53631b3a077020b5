"""How a model's clips were made: sampling.json beside a checkpoint, {"sampling": "dense", "short_side": 320}.

A model that learned from frames four apart answers worse about frames of a whole video, so a test must know. So it is
with pictures that were made smaller before everything else.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

from cast.ground.files import read_json, write_json

#: Frames of the whole video (EPIC-Kitchens-100, Something-Something V2), or about four apart (Kinetics-400).
Sampling = Literal["uniform", "dense"]

#: In a checkpoint's directory.
SAMPLING = "sampling.json"


def read_sampling(directory: str | os.PathLike[str]) -> Sampling | None:
    """The sampling that `sampling.json` in a directory names; None where it names none, or there is no such file.

    Raises:
        ValueError: the file is no JSON, or names no sampling that there is.
    """
    found = _read(directory).get("sampling")
    for sampling in get_args(Sampling):
        if found == sampling:
            return sampling
    return None


def read_short_side(directory: str | os.PathLike[str]) -> int | None:
    """Pixels to which the training shrank larger pictures, as `sampling.json` in a directory says.

    Returns:
        None where pictures stayed as they were: the file says nothing, as all of earlier versions, or is not there.

    Raises:
        ValueError: as :func:`read_sampling`, or no whole number above 0.
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
        f'{path}: must hold {allowed}, and "short_side" in pixels where pictures were made smaller; remove it if '
        "neither is known"
    )


def as_json(sampling: Sampling | None, short_side: int | None = None) -> dict[str, str | int] | None:
    """The content of `sampling.json`, without what is None; None if there is nothing to say."""
    known = {"sampling": sampling, "short_side": short_side}
    return {name: value for name, value in known.items() if value is not None} or None


def write_sampling(directory: str | os.PathLike[str], sampling: Sampling | None, short_side: int | None = None) -> None:
    """Write `sampling.json` into a directory; a kill leaves the old file or the new one."""
    write_json(Path(directory) / SAMPLING, as_json(sampling, short_side))
