"""The machine that runs one batch of CTAs: control flow and barriers.

While all lanes agree the batch runs block by block; when they part, each lane keeps its own block and the lowest runs.
"""

import copy
from typing import Any

import numpy as np

from ptx_emulator.checks import Checker
from ptx_emulator.counters import Counters
from ptx_emulator.decode import SHARED_BASE, Array
from ptx_emulator.errors import Deadlock, Unsupported
from ptx_emulator.memory import Memory
from ptx_emulator.program import Barrier, Block, Jump, Leave, Program, Use
from ptx_emulator.registers import first_registers
from ptx_emulator.shared import SharedMemory

DONE = np.iinfo(np.int32).max
BARRIERS = 16
MAX_SPLITS = 4  # a batch may part into 16


class Machine:
    """State of one batch of `ctas` CTAs of `threads` threads."""

    def __init__(
        self,
        program: Program,
        cta_numbers: Array,
        grid: tuple[int, int, int],
        threads: int,
        parameters: Array,
        memory: Memory,
        shared_bytes: int,
        counters: Counters,
        checks: bool,
    ) -> None:
        kernel = program.kernel
        self.program, self.kernel, self.memory, self.counters = program, kernel, memory, counters
        self.ctas, self.threads, self.warps = len(cta_numbers), threads, threads // 32
        self.cta_numbers = cta_numbers
        self.lanes = self.ctas * threads
        self.shape = (self.ctas, threads)
        self.every_thread = np.arange(threads)
        self.every_lane_thread = np.tile(self.every_thread, self.ctas)
        self.every_lane_cta = np.repeat(np.arange(self.ctas), threads)
        self.parameters = parameters
        dynamic = program.decoder.dynamic_offset
        self.shared_end = SHARED_BASE + (dynamic + shared_bytes if shared_bytes else kernel.shared_bytes)
        self.shared = SharedMemory(self.ctas, self.shared_end)
        self.local = np.full((self.ctas, threads, kernel.local_bytes), 0x7F, np.uint8) if kernel.local_bytes else None
        self.splits = 0
        self.step = 0
        self.trace: list[int] = [0]
        self.checker = Checker(self, program.granule) if checks else None
        self.copies: list[Any] = []
        self.copy_group: Array | int = 0
        self.products: Any = None
        self.pending_registers: set[int] = set()
        self.pending_inputs: set[int] = set()
        self.renamed: dict[int, tuple[Array, Array]] = {}  # register -> its value, and the value that it is a copy of
        self.fragments: dict[Any, Any] = {}
        self.r: list[Any] = first_registers(self, grid)
        self.arrived = np.zeros((self.ctas, BARRIERS), np.int64)
        self.expected = np.zeros((self.ctas, BARRIERS), np.int64)  # 0: every live thread
        self.taking_part = np.zeros((self.ctas, BARRIERS, self.warps), bool)
        self.last_barrier = ""

    def tick(self, number: int) -> int:
        """Begin a step that touches memory: instruction `number` executes. Steps order the accesses."""
        self.step += 1
        if self.checker is not None:
            self.trace.append(number)
        return self.step

    def full(self, value: Array) -> Array:
        """`value` for every lane, shape (CTAs, threads)."""
        return value if value.shape == self.shape else np.broadcast_to(value, self.shape)

    def part(self, ctas: Array) -> "Machine":
        """A machine that goes on with some of the CTAs, where nothing is in flight."""
        other = copy.copy(self)
        other.ctas, other.cta_numbers = len(ctas), self.cta_numbers[ctas]
        other.lanes, other.shape = len(ctas) * self.threads, (len(ctas), self.threads)
        other.every_lane_thread = np.tile(self.every_thread, other.ctas)
        other.every_lane_cta = np.repeat(np.arange(other.ctas), self.threads)
        other.shared = self.shared.part(ctas)
        other.local = None if self.local is None else self.local[ctas]
        other.trace, other.fragments, other.copies = list(self.trace), {}, []
        other.pending_registers, other.pending_inputs, other.renamed = set(), set(), {}
        other.r = [value[ctas] if value.shape[0] == self.ctas else value for value in self.r]
        for name in ("arrived", "expected", "taking_part"):
            setattr(other, name, getattr(self, name)[ctas])
        other.splits = self.splits + 1
        if self.checker is not None:
            other.checker = self.checker.part(other)
        return other

    def _can_part(self) -> bool:
        """Whether no asynchronous work and no race account per CTA stands in the way, and few parts have been made."""
        accounts = 1 if self.checker is None else self.checker.rows
        idle = not self.copies and isinstance(self.copy_group, int) and self.products is None
        return self.ctas > 1 and idle and accounts == 1 and self.splits < MAX_SPLITS

    def _run_parts(self, number: int, holding: Array) -> bool:
        """Where whole CTAs part ways at the end of block `number`, run one kind after the other, each undivided."""
        end = self.program.blocks[number].end
        whole = holding.all(1)
        if isinstance(end, Barrier) or not self._can_part() or (whole != holding.any(1)).any():
            return False
        if isinstance(end, Jump):
            self.part(np.flatnonzero(whole)).run(end.target)
        self.part(np.flatnonzero(~whole)).run(number + 1)
        return True

    def run(self, first: int = 0) -> None:
        """Run the batch from block `first` to its end."""
        block: int | None = first
        live: Array | None = None
        while block is not None:
            block, live = self._together(block, live)

    def _execute(self, block: Block, mask: Array | None) -> None:
        warps = self.ctas * self.warps
        if mask is not None:
            warps = int(mask.reshape(-1, 32).any(1).sum())
        self.counters.warp_instructions += warps * block.size
        if not self.pending_registers and not block.starts_products:
            for action in block.body:
                action(self, mask)
            return
        for action, use in zip(block.body, block.uses, strict=True):
            if self.checker is not None and not (
                self.pending_registers.isdisjoint(use.touched) and self.pending_inputs.isdisjoint(use.written)
            ):
                self._check_use(use, mask)
            action(self, mask)

    def _check_use(self, use: Use, mask: Array | None) -> None:
        """Report an instruction that touches registers of a wgmma that its warpgroups have not waited for."""
        for kind, mine, theirs in (
            ("register of a pending wgmma used", use.touched, "registers"),
            ("input register of a pending wgmma overwritten", use.written, "inputs"),
        ):
            for product in self.products.flying:
                if mine.isdisjoint(getattr(product, theirs)):
                    continue
                groups = product.active
                if mask is not None:
                    groups = groups & np.broadcast_to(mask, self.shape).reshape(*groups.shape, -1).any(2)
                if groups.any() and self.checker is not None:
                    self.checker.note(kind, use.number, product.number, int(np.flatnonzero(groups.any(1))[0]))
                    break

    def _holding(self, end: Jump | Leave | Barrier, mask: Array | None) -> Array | bool:
        """The lanes of the mask for which the guard of a block's end holds; True for all, False for none."""
        if end.guard is None:
            return True
        holds = self.r[end.guard]
        if end.negated:
            holds = ~holds
        if holds.size == 1:
            return bool(holds.flat[0])
        holds = self.full(holds)
        inside = holds if mask is None else holds & mask
        if not inside.any():
            return False
        total = self.lanes if mask is None else int(mask.sum())
        return True if int(inside.sum()) == total else inside

    def _together(self, number: int, live: Array | None) -> tuple[int | None, Array | None]:
        """Run while every live lane is at the same block."""
        blocks = self.program.blocks
        while number < len(blocks):
            block = blocks[number]
            self._execute(block, live)
            end = block.end
            if end is None:
                number += 1
                continue
            holding = self._holding(end, live)
            if holding is False:
                number += 1
            elif holding is not True or (
                isinstance(end, Barrier) and (end.count is not None or not end.waits or self.r[end.number].size > 1)
            ):
                if live is None and not isinstance(holding, bool) and self._run_parts(number, holding):
                    return None, None
                return self._apart(number, live, holding)
            elif isinstance(end, Jump):
                number = end.target
            elif isinstance(end, Leave):
                return None, None
            else:
                self._all_arrived(live)
                number += 1
        return None, None

    def _all_arrived(self, live: Array | None) -> None:
        self.counters.barriers += self.ctas
        self.tick(-1)
        if self.checker is not None:
            self.checker.barrier_all()

    def _apart(self, number: int, live: Array | None, holding: Array | bool) -> tuple[int | None, Array | None]:
        """Run lanes that are at different blocks, lowest block first, until they meet again or leave.

        The block `number` has just been executed by the live lanes; `holding` are those for which its end applies.
        """
        blocks = self.program.blocks
        at = np.full(self.shape, number, np.int32)
        if live is not None:
            at[~live] = DONE
        waiting = np.full(self.shape, -1, np.int32)
        active = np.ones(self.shape, bool) if live is None else live
        while True:
            self._part(blocks[number].end, number, active, holding, at, waiting)
            self._release(at, waiting)
            runnable = (at < DONE) & (waiting < 0)
            if not runnable.any():
                if (at == DONE).all():
                    return None, None
                self._deadlock(at, waiting)
            number = int(at[runnable].min())
            active = runnable & (at == number)
            count = int(active.sum())
            if number >= len(blocks):
                at[active] = DONE
                holding, number = False, len(blocks) - 1
                active = np.zeros(self.shape, bool)
                continue
            if count == int((at < DONE).sum()):
                return number, None if count == self.lanes else active
            self._execute(blocks[number], active)
            end = blocks[number].end
            holding = False if end is None else self._holding(end, active)

    def _part(self, end: Any, number: int, active: Array, holding: Array | bool, at: Array, waiting: Array) -> None:
        """Move the active lanes past the end of block `number`."""
        at[active] = number + 1
        if end is None or holding is False:
            return
        moved = active if holding is True else holding
        if isinstance(end, Jump):
            at[moved] = end.target
        elif isinstance(end, Leave):
            at[moved] = DONE
        else:
            names = np.broadcast_to(self.r[end.number], self.shape)
            self.last_barrier = end.text
            counts = None if end.count is None else np.broadcast_to(self.r[end.count], self.shape)
            if int(names[moved].max()) >= BARRIERS:
                raise Unsupported(f"unsupported: barrier {int(names[moved].max())} of {BARRIERS} in {end.text}")
            self._arrive(moved, names, counts, end.waits, waiting)

    def _arrive(self, moved: Array, names: Array, counts: Array | None, waits: bool, waiting: Array) -> None:
        for name in np.unique(names[moved]):
            lanes = moved & (names == name)
            self.arrived[:, name] += lanes.sum(1)
            self.taking_part[:, name] |= lanes.reshape(self.ctas, self.warps, 32).any(2)
            ctas = lanes.any(1)
            if counts is not None:
                self.expected[ctas, name] = np.where(lanes, counts, 0).max(1)[ctas]
            if waits:
                waiting[lanes] = name

    def _release(self, at: Array, waiting: Array) -> None:
        """Complete every barrier that all its threads have reached."""
        for cta, name in zip(*np.nonzero(self.arrived), strict=True):
            expected = int(self.expected[cta, name]) or int((at[cta] < DONE).sum())
            if self.arrived[cta, name] < expected:
                continue
            here = waiting[cta] == name
            waiting[cta, here] = -1
            self.counters.barriers += 1
            self.tick(-1)
            if self.checker is not None:
                self.checker.barrier(int(cta), self.taking_part[cta, name], here.reshape(self.warps, 32).any(1))
            self.arrived[cta, name] = 0
            self.expected[cta, name] = 0
            self.taking_part[cta, name] = False

    def _deadlock(self, at: Array, waiting: Array) -> None:
        cta = int(np.nonzero((waiting >= 0).any(1))[0][0])
        names, counts = np.unique(waiting[cta][waiting[cta] >= 0], return_counts=True)
        held = ", ".join(f"{count} threads at barrier {name}" for name, count in zip(names, counts, strict=True))
        raise Deadlock(
            f"no thread can go on at {self.last_barrier}: CTA {int(self.cta_numbers[cta])} has {held} "
            f"of {int((at[cta] < DONE).sum())} live threads"
        )
