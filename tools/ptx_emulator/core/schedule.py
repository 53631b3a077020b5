"""Which runnable lanes go next, and when a copy lands, drawn from a seed.

After "A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs" (Burckhardt et al., 2010): every group of
warps has a priority, the highest that can go on runs, and now and then the one that has just run falls to the lowest.
So one side may run far ahead of the other, which a fair lottery would hardly ever do. A group is a warpgroup where the
kernel has instructions of one, else a warp. Without a schedule the lanes at the lowest block run, but in turns: those
that jump back and back, as a loop that tries for a lock does, let the others go on.
"""

import numpy as np

from ptx_emulator.core.batch import Batch
from ptx_emulator.core.spaces import Array

FALLS = 1 / 32  # how often the group that has just run falls to the lowest priority
LANDS = 1 / 8  # how often a copy lands before a block, where copies land at random
RUNS_OUT = 1 / 4  # how often a `try_wait` that would have to wait returns false
PATIENCE = 100  # jumps back before lanes let others go on


def group_size(m: Batch) -> int:
    """The threads that go together: those of a warpgroup where the kernel has instructions of one, else of a warp."""
    collective = bool(m.kernel.instructions.of("wgmma", "setmaxnreg"))
    return 128 if collective and m.threads % 128 == 0 else 32


class Priorities:
    """The schedule of one batch."""

    def __init__(self, m: Batch, seed: int) -> None:
        self.random: np.random.Generator = np.random.default_rng(seed)
        self.limits: np.random.Generator = np.random.default_rng((seed, 1))
        self.size: int = group_size(m)
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

    def runs_out(self) -> bool:
        """Whether a `try_wait` returns before what it waits for has come, as PTX allows it after some time."""
        return bool(self.limits.random() < RUNS_OUT)

    def any_of(self, count: int) -> int:
        """One of `count` copies on their way."""
        return int(self.random.integers(count))


class Turns:
    """Whose turn it is where the lowest block runs first. Lanes of one group do not pass each other: they are to meet
    again."""

    def __init__(self, m: Batch) -> None:
        self.size: int = group_size(m)
        self.had: Array = np.zeros(m.shape, bool)  # lanes that have had their turn
        self.jumps: int = 0  # back, since a turn ended

    def among(self, runnable: Array) -> Array:
        """Those of the lanes whose turn it is."""
        if not self.had.any():
            return runnable
        left = runnable & ~self.had
        if left.any():
            return left
        self.had[:] = False
        return runnable

    def jumped_back(self, moved: Array, runnable: Array) -> None:
        """Some of the lanes that may run have jumped back; the others are elsewhere."""
        self.jumps += 1
        if self.jumps <= PATIENCE:
            return
        self.jumps = 0
        rest = (runnable & ~moved).reshape(-1, self.size).any(1)
        whole = moved.reshape(-1, self.size).any(1) & ~rest
        if rest.any():
            self.had |= np.repeat(whole, self.size).reshape(self.had.shape)
