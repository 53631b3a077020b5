"""How a model's clips were sampled: sampling.json beside a checkpoint, {"sampling": "dense"}.

A model that learned from frames four apart answers worse about frames of a whole video, so a test must know.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from cast.files import read_json, write_json

#: Frames of the whole video (EPIC-Kitchens-100, Something-Something V2), or about four apart (Kinetics-400).
Sampling = Literal["uniform", "dense"]

#: In a checkpoint's directory.
SAMPLING = "sampling.json"


def read_sampling(directory: str | os.PathLike[str]) -> Sampling | None:
    """The sampling that `sampling.json` in a directory names; None where there is no such file.

    Raises:
        ValueError: the file is no JSON, or names no sampling that there is.
    """
    path = Path(directory) / SAMPLING
    if not path.exists():
        return None
    content = read_json(path)
    found = content.get("sampling") if isinstance(content, dict) else None
    for sampling in get_args(Sampling):
        if found == sampling:
            return sampling
    allowed = " or ".join(f'{{"sampling": "{sampling}"}}' for sampling in get_args(Sampling))
    raise ValueError(f"{path}: must hold {allowed}; remove it if the sampling is not known")


def as_json(sampling: Sampling | None) -> dict[str, str] | None:
    """The content of `sampling.json`; None for a sampling that is not known."""
    return None if sampling is None else {"sampling": sampling}


def write_sampling(directory: str | os.PathLike[str], sampling: Sampling) -> None:
    """Write `sampling.json` into a directory; a kill leaves the old file or the new one."""
    write_json(Path(directory) / SAMPLING, as_json(sampling))
