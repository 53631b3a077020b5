"""Order between the lanes of a warp: an account of shared memory by lane, for `launch(lane_order=True)`.

Since sm_70 the lanes of a warp need not go together, so that what one writes another may read only behind a
`bar.warp.sync`, or a barrier that both have come to. The checker's clocks have warps; the column of a warp's clock that
is its own says when its lanes last met.
"""

from typing import Any

import numpy as np

from ptx_emulator.core.spaces import Array

LANES = 32
BETWEEN = "between lanes of a warp that have not met"  #: behind the kind of race


class LaneOrder:
    """Which lane wrote each granule last and which two read it, as step * 2^20 + lane; 0: none.

    A lane's number is that of its warp, or of its agent in a cluster, times 32, plus its place.
    """

    bits = 20  # of a tag that name the lane

    def __init__(self, checker: Any, count: int) -> None:
        self.checker = checker
        self.writer: Array = np.zeros(count, np.int64)
        self.readers: tuple[Array, Array] = (
            self.writer.copy(),
            self.writer.copy(),
        )  # of a step, the lanes farthest apart

    def read(self, index: Array, row: Array, warp: Array, thread: Array) -> None:
        """Lanes read granules; shapes as `Checker.locate` gives them, thread [n]."""
        now = self._now(index, warp, thread)
        self._report("write-read", self.writer[index], now, index, row, warp)
        first, last = self.readers
        last[index] = now  # of several lanes the last stays
        first[np.ascontiguousarray(index[:, ::-1])] = np.ascontiguousarray(now[:, ::-1])

    def write(self, index: Array, row: Array, warp: Array, thread: Array) -> None:
        """Lanes are about to write granules."""
        now = self._now(index, warp, thread)
        self._report("write-write", self.writer[index], now, index, row, warp)
        for tags in self.readers:
            self._report("read-write", tags[index], now, index, row, warp)
        self.writer[index] = now

    def _now(self, index: Array, warp: Array, thread: Array) -> Array:
        """The tag of each lane at the step under way."""
        lane = warp.astype(np.int64) * LANES + (thread % LANES)[None, :, None]
        return np.broadcast_to(self.checker.m.step << self.bits | lane, index.shape)

    def _report(self, kind: str, tag: Array, now: Array, index: Array, row: Array, warp: Array) -> None:
        """Where another lane of the same warp made the access `tag`, and the lanes have not met since."""
        lane, other = (tags & ((1 << self.bits) - 1) for tags in (now, tag))
        unmet = (tag > 0) & (other != lane) & (other // LANES == lane // LANES)
        if not unmet.any():
            return
        step = tag >> self.bits
        unmet &= step > self.checker.last_meeting(row, warp)
        self.checker.report(f"{kind} {BETWEEN}", unmet, step << self.checker.bits | warp, index, warp)
