"""Seconds of the whole run."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Kept for the end: what was found is written, and processes that do not end are killed.
RESERVE = 30.0


class Budget:
    """What is left of a time that began when this was made.

    Args:
        seconds: of the whole run.
        reserve: of these, kept for the end.
        clock: gives seconds, and never goes back.
    """

    def __init__(self, seconds: float, reserve: float = RESERVE, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._begin = clock, clock()
        self._end = self._begin + seconds - reserve

    def used(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._begin

    def left(self) -> float:
        """Seconds until what is kept for the end."""
        return max(0.0, self._end - self._clock())

    def allow(self, wanted: float, needed: float) -> float:
        """Seconds that something gets which wants so many; 0 if fewer than `needed` are left."""
        given = min(wanted, self.left())
        return given if given >= needed else 0.0
