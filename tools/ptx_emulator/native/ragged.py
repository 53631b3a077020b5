"""Rows of different lengths, one after the other in one array."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ptx_emulator.core.spaces import Array


@dataclass
class Ragged:
    """Row i is `data[starts[i] : starts[i + 1]]`."""

    data: Array
    starts: Array

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> "Ragged":
        """Rows of numbers."""
        every = list(rows)
        counts = np.array([0, *map(len, every)], np.int64)
        return cls(np.array([number for row in every for number in row], np.int64), np.cumsum(counts))

    @property
    def counts(self) -> Array:
        """The length of each row."""
        return np.diff(self.starts)

    def gather(self, rows: Array) -> tuple[Array, Array]:
        """(the numbers of these rows one after the other, for each of them which of `rows` it is of)."""
        counts = self.counts[rows]
        owner = np.repeat(np.arange(len(rows)), counts)
        first = np.cumsum(counts) - counts
        return self.data[self.starts[rows][owner] + np.arange(len(owner)) - first[owner]], owner
