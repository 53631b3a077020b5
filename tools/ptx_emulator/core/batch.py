"""The frame of one batch of CTAs: its geometry, its shared memory and its time, which is all that the checkers know."""

import math

import numpy as np

from ptx_emulator.core.kernel import Kernel
from ptx_emulator.core.shared import SharedMemory
from ptx_emulator.core.spaces import Array


class Batch:
    """`len(cta_numbers)` CTAs of `threads` threads of a grid. A lane is one thread of one of them."""

    def __init__(
        self, kernel: Kernel, cta_numbers: Array, threads: int, cluster_shape: tuple[int, int, int], shared_end: int
    ) -> None:
        self.kernel = kernel
        self.threads: int = threads
        self.warps: int = threads // 32
        self.cluster_shape: tuple[int, int, int] = cluster_shape
        self.cluster: int = math.prod(cluster_shape)
        self.shared_end = shared_end  # the first address behind a CTA's shared memory
        self.every_thread: Array = np.arange(threads)
        self.shared: SharedMemory = SharedMemory(len(cta_numbers), shared_end)
        self.step = 0
        self.trace: list[int] = [0]  # the instruction of each step
        self.pending_registers: set[int] = set()  # that products in flight will write
        self.pending_inputs: set[int] = set()  # that products in flight read
        self.hold(cta_numbers)

    def hold(self, cta_numbers: Array) -> None:
        """Consist of these CTAs, by their numbers in the grid."""
        self.cta_numbers: Array = cta_numbers
        self.ctas: int = len(cta_numbers)
        self.lanes: int = self.ctas * self.threads
        self.shape: tuple[int, int] = (self.ctas, self.threads)
        self.every_lane_thread: Array = np.tile(self.every_thread, self.ctas)
        self.every_lane_cta: Array = np.repeat(np.arange(self.ctas), self.threads)

    def agent(self, cta: int, thread: int) -> int:
        """The number of a thread's warp in its cluster."""
        return cta % self.cluster * self.warps + thread // 32

    def forget(self) -> None:
        """Let go of everything, so that the next batch gets this one's memory: its parts know it, so that Python would
        not see it end before it next looks for cycles."""
        vars(self).clear()
