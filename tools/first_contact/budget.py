"""The seconds of the whole run."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Kept for the end: writing the results, and killing processes that do not end.
RESERVE = 30.0


class Budget:
    """The remaining time of a run that began with this object.

    Args:
        seconds: all seconds of the run.
        reserve: part of them kept for the end.
        clock: returns seconds that never decrease.
    """

    def __init__(self, seconds: float, reserve: float = RESERVE, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._begin = clock, clock()
        self._end = self._begin + seconds - reserve

    def used(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._begin

    def left(self) -> float:
        """Seconds until the reserve begins."""
        return max(0.0, self._end - self._clock())

    def allow(self, wanted: float, needed: float) -> float:
        """Seconds granted of those wanted; 0 if fewer than `needed` are left."""
        given = min(wanted, self.left())
        return given if given >= needed else 0.0
