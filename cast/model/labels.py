"""Class names beside a checkpoint: labels.json, {"verb": [...], "noun": [...]} or {"action": [...]}."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cast.ground.files import read_json

#: In a checkpoint's directory.
LABELS = "labels.json"


def read_labels(directory: str | os.PathLike[str], classes: Mapping[str, int]) -> dict[str, list[str]] | None:
    """Class names by head from `labels.json` in a directory; None if there is no such file.

    Args:
        directory: of a checkpoint.
        classes: number of classes by head.

    Raises:
        ValueError: the file is no JSON, lacks a head, or the number of names of a head differs from its number of
            classes.
    """
    path = Path(directory) / LABELS
    if not path.exists():
        return None
    names = read_json(path)
    check_names(str(path), names, classes)
    return {head: [str(name) for name in names[head]] for head in classes}


def numbers(classes: Mapping[str, int]) -> dict[str, list[str]]:
    """The classes' numbers as names, by head."""
    return {head: [str(index) for index in range(count)] for head, count in classes.items()}


def check_names(what: str, names: object, classes: Mapping[str, int]) -> None:
    """Check that each head has as many class names as classes.

    Raises:
        ValueError: a head without a list, or with another number of names.
    """
    for head, count in classes.items():
        given = names.get(head) if isinstance(names, Mapping) else None
        number = len(given) if isinstance(given, Sequence) and not isinstance(given, str) else None
        if number != count:
            found = "none" if number is None else f"{number} names"
            raise ValueError(
                f"{what}: must have a list of {count} names for {head!r}, as the model has; it has {found}"
            )
