"""The checks' memory of shared memory, a row for each CTA, as the vector machine reads and writes it."""

import copy
import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from typing import Any

import numpy as np

from ptx_emulator.core.batch import Batch
from ptx_emulator.core.checks import Checker
from ptx_emulator.core.spaces import Array
from ptx_emulator.native.library import KINDS, library
from ptx_emulator.native.library import Batch as MachineBatch

TAGS = ("writer", "reader", "reader_too", "flight")  # in the order in which a granule has them


class Operand(ctypes.Structure):
    """`Operand` in csrc/ptx/products.h."""

    _fields_ = [
        *((name, c_int64) for name in ("count", "many")),
        *((name, c_void_p) for name in ("first", "operand", "operands", "fence")),
    ]


class NativeChecker(Checker):
    """A `Checker` whose tags lie side by side for each granule."""

    rows: int
    epochs: Array
    seen: Array
    fence: Array
    writer: Array
    reader: Array
    reader_too: Array
    flight: Array
    operand: Array
    operands: Array
    tags: Array  # [CTAs][granules][TAGS]
    prepare: Callable[[], MachineBatch]  # the compiled machine's batch, up to date

    def __init__(self, machine: Batch, granule: int) -> None:
        super().__init__(machine, granule)
        self.rows = machine.ctas
        self.seen, self.fence = (np.repeat(array, self.rows, 0) for array in (self.seen, self.fence))
        self.operand = np.zeros(self.rows * self.count, self.operand.dtype)  # pages that nothing touches cost nothing
        self.operands = np.zeros(self.rows * self.count, self.operands.dtype)
        self.flying = True  # the machine knows of the copies in flight; the interpreter looks for their tags
        self._hold(np.zeros((machine.ctas, self.count, len(TAGS)), np.int32))

    def _hold(self, tags: Array) -> None:
        self.tags = tags
        flat = tags.reshape(-1, len(TAGS))
        self.writer, self.reader, self.reader_too, self.flight = (flat[:, i] for i in range(len(TAGS)))

    def part(self, machine: Batch) -> "NativeChecker":
        """A checker for a part of the batch; `take` says for which."""
        other = copy.copy(self)
        other.m = machine
        return other

    def take(self, ctas: Array) -> None:
        """Keep the rows of these CTAs, which are the batch from now on."""
        self._hold(self.tags[ctas])
        self.rows = len(ctas)
        self.epochs, self.seen, self.fence = self.epochs[ctas], self.seen[ctas], self.fence[ctas]
        self.operand = self.operand.reshape(-1, self.count)[ctas].reshape(-1)
        self.operands = self.operands.reshape(-1, self.count)[ctas].reshape(-1)

    def operand_read(self, chunks: Array, groups: Array, common: bool, regions: list[Any]) -> None:
        """A wgmma of the warpgroups `groups`, [CTAs, warpgroups], begins to read 16-byte chunks. `regions` is for
        `operands_done`."""
        first = (chunks // self.granule).astype(np.int32)
        self._operands(first, groups, True)
        regions.append((first, groups.copy(), None))

    def operands_done(self, regions: list[Any], done: Array) -> None:
        """The warpgroups `done`, [CTAs, warpgroups], have waited for a product."""
        for first, groups, _ in regions:
            self._operands(first, groups & done, False)
            groups &= ~done

    def _operands(self, first: Array, groups: Array, reads: bool) -> None:
        """Tell the machine of the granules from `first`, those of a chunk each, that a product reads or has read."""
        if not groups.any():
            return
        call = Operand(len(first), 16 // self.granule, first.ctypes.data, self.operand.ctypes.data)
        call.operands, call.fence = self.operands.ctypes.data, self.fence.ctypes.data
        which = np.ascontiguousarray(groups)
        batch, here, step = self.prepare(), self.m.trace[-1], self.m.step
        where = ctypes.byref(call), which.ctypes.data
        library().operand(batch, *where, groups.shape[1], here, step, int(reads))

    def found(self, findings: Array) -> None:
        """Record what the machine has found, a row each, in the order of library.FINDING_WORDS."""
        for kind, here, other, granule, other_warp, warp, cta, epoch in findings.tolist():
            if granule < 0:
                self.note(KINDS[kind], here, other, cta)
                continue
            now, self.epochs[cta] = self.epochs[cta], epoch
            self.record(KINDS[kind], here, other, cta, granule, (other_warp, warp))
            self.epochs[cta] = now
