"""What `triton.autotune` gets where nothing can be timed: a choice of configurations instead of a measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Tuning:
    """Stands for Triton's benchmarker; a configuration's "time" is its place in the program's list.

    Args:
        every: execute each configuration once, as a benchmark would. Otherwise configurations are compiled until one
            fits into shared memory. The program's own launch executes that one; those behind it are left out.
    """

    def __init__(self, every: bool) -> None:
        self.every: bool = every
        self.trying: bool = False  # a configuration is being tried, not launched by the program
        self._asked = self._fits = 0

    def benchmark(self, launch: Callable[[], Any], quantiles: Sequence[float] | None = None, **_: Any) -> list[float]:
        """Triton asks for each configuration in turn. It skips one whose launch raises OutOfResources by itself."""
        self._asked += 1
        if self._fits and not self.every:
            return self._times(float("inf"), quantiles)
        self.trying = True
        try:
            launch()
        finally:
            self.trying = False
        self._fits += 1
        return self._times(float(self._asked), quantiles)

    @staticmethod
    def _times(time: float, quantiles: Sequence[float] | None) -> list[float]:
        return [time] * len(quantiles or (0.5,))

    @property
    def skips(self) -> bool:
        """Whether the launch that comes now is only to show that it fits."""
        return self.trying and not self.every

    def ended(self) -> int:
        """How many configurations were asked for since the last launch of the program's own, which comes now."""
        asked, self._asked, self._fits = self._asked, 0, 0
        return asked
