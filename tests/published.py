"""What the published functions answered (`golden/published_functions.json.gz`), and generators that give every draw.

The numbers came from executing the official code of CAST, of VideoMAE and of EPIC-Kitchens' C1 challenge, at the
commits under `sources`, on inputs of ours. The file has results and parameter names, none of that code.
"""

from __future__ import annotations

import gzip
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@cache
def published() -> dict[str, Any]:
    """The whole file."""
    with gzip.open(Path(__file__).parent / "golden" / "published_functions.json.gz", "rt") as file:
        answers: dict[str, Any] = json.load(file)
    return answers


class Scripted:
    """Stands for a generator of NumPy: its n-th integer is the n-th of `draws`, or the first of all."""

    def __init__(self, *draws: int) -> None:
        self.draws = list(draws)
        self.choices: list[int] = []  # how many there were to choose from, draw by draw

    def integers(self, high: int, size: int | None = None) -> Any:
        self.choices.append(high)
        drawn = self.draws.pop(0) if self.draws else 0
        assert 0 <= drawn < high
        return drawn if size is None else np.full(size, drawn)

    def random(self, size: int) -> np.ndarray:
        return np.zeros(size)


class PythonsOwn:
    """Stands for a generator of NumPy, and draws from Python's `random` as the official code does."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def random(self) -> float:
        return self._random.random()

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)

    def integers(self, high: int) -> int:
        return self._random.randint(0, high - 1)
