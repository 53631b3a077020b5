"""Which runnable lanes go next, and when a copy lands, drawn from a seed.

After "A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs" (Burckhardt et al., 2010): every group of
warps has a priority, the highest that can go on runs, and now and then the one that has just run falls to the lowest.
So one side may run far ahead of the other, which a fair lottery would hardly ever do. A group is a warpgroup where the
kernel has instructions of one, else a warp. Without a schedule the lanes at the lowest block run.
"""

import numpy as np

from ptx_emulator.core.batch import Batch
from ptx_emulator.core.spaces import Array

FALLS = 1 / 32  # how often the group that has just run falls to the lowest priority
LANDS = 1 / 8  # how often a copy lands before a block, where copies land at random


class Priorities:
    """The schedule of one batch."""

    def __init__(self, m: Batch, seed: int) -> None:
        self.random: np.random.Generator = np.random.default_rng(seed)
        collective = bool(m.kernel.instructions.of("wgmma", "setmaxnreg"))
        self.size = 128 if collective and m.threads % 128 == 0 else 32
        self.priority: Array = self.random.permutation(m.lanes // self.size).astype(np.float64)

    def choose(self, m: Batch, runnable: Array) -> Array:
        """The lanes of the group that runs next, among those that can; [CTAs, threads]."""
        groups = runnable.reshape(-1, self.size)
        able = np.flatnonzero(groups.any(1))
        chosen = able[np.argmax(self.priority[able])]
        if self.random.random() < FALLS:
            self.priority[chosen] = self.priority.min() - 1
        only = np.zeros_like(groups)
        only[chosen] = groups[chosen]
        return only.reshape(m.shape)

    def lands(self) -> bool:
        """Whether a copy lands before the next block, where copies land at random."""
        return bool(self.random.random() < LANDS)

    def any_of(self, count: int) -> int:
        """One of `count` copies on their way."""
        return int(self.random.integers(count))
