"""The machine that runs one batch of CTAs: control flow and barriers.

While all lanes agree the batch runs block by block; when they part, each lane keeps its own block and the lowest runs.
"""

from collections import Counter
from typing import Any, Self

import numpy as np

from ptx_emulator.core.checks import Checker
from ptx_emulator.core.clocks import ClusterChecker
from ptx_emulator.core.counters import Counters
from ptx_emulator.core.decode import Action
from ptx_emulator.core.errors import Deadlock, EmulationError
from ptx_emulator.core.exits import check_exits
from ptx_emulator.core.forms.barriers import CtaBarriers, WarpBarriers
from ptx_emulator.core.forms.bulk import Bulk
from ptx_emulator.core.forms.clusters import ClusterBarriers
from ptx_emulator.core.forms.mbarriers import MBarriers
from ptx_emulator.core.forms.wgmma import Products
from ptx_emulator.core.memory import Memory
from ptx_emulator.core.program import Block, Jump, Leave, Program, Use, use_of
from ptx_emulator.core.registers import first_registers
from ptx_emulator.core.schedule import Priorities, Turns
from ptx_emulator.core.spaces import SHARED_BASE, Array
from ptx_emulator.core.state import State, Wait

DONE = np.iinfo(np.int32).max
FRUITLESS = 1000  # rounds of tests without any progress that are taken for a deadlock
SECOND = 1_000_000_000  # nanoseconds
LONGEST = 60  # seconds that may pass while no thread can go on
MAX_SPLITS = 4  # a batch may part into 16


class Machine(State):
    """Runs one batch of CTAs: the state, and where each lane is in the program."""

    sees_lanes = True  # whether it can look at the order between the lanes of a warp

    @classmethod
    def built(cls) -> bool:
        """Whether it can run here."""
        return True

    @classmethod
    def lanes_of_batch(cls, program: Program, threads: int, cluster: int) -> int:
        """Lanes of a batch: enough to hide NumPy's cost per call, few enough for a register to stay in cache."""
        return 16384

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
        cluster_shape: tuple[int, int, int] = (1, 1, 1),
        landing: str = "late",
        seed: int | None = None,
        lane_order: bool = False,
    ) -> None:
        kernel, dynamic = program.kernel, program.decoder.dynamic_offset
        shared_end = SHARED_BASE + (dynamic + shared_bytes if shared_bytes else kernel.shared_bytes)
        super().__init__(kernel, cta_numbers, threads, cluster_shape, shared_end, parameters, memory, counters, landing)
        self.program = program
        ends = [block.end for block in program.blocks]
        self.waits: dict[int, Wait] = {number: end for number, end in enumerate(ends) if isinstance(end, Wait)}
        self.splits = 0
        if checks:
            kind = ClusterChecker if program.clocked or self.cluster > 1 else Checker
            self.checker: Checker | None = kind(self, program.granule)
            if lane_order:
                self.checker.watch_lanes()
        self.r: list[Any] = first_registers(self, program.decoder, grid)
        for barriers in (CtaBarriers, WarpBarriers, ClusterBarriers):  # in the order in which they settle
            self.of(barriers)
        self.rounds: int = 0  # of tests that all failed
        self.rounds_since: int = 0  # the progress at the first of them
        self.has_ended: Array = np.zeros(self.ctas, bool)
        self.interpreted: Counter[str] = Counter()  # warp instructions by opcode, for a machine with code of its own
        self.schedule: Priorities | None = None if seed is None else Priorities(self, seed)

    def part(self, ctas: Array) -> Self:
        """A machine that goes on with some of the CTAs, where nothing is in flight."""
        other = super().part(ctas)
        other.has_ended = np.zeros(other.ctas, bool)
        other.splits = self.splits + 1
        return other

    def _can_part(self) -> bool:
        """Whether no asynchronous work and no race account per CTA stands in the way, and few parts have been made."""
        accounts = 1 if self.checker is None else self.checker.rows
        idle = all(part.may_part() for part in self.parts.values()) and self.schedule is None
        idle = idle and not self.program.clocked and self.cluster == 1
        return self.ctas > 1 and idle and accounts == 1 and self.splits < MAX_SPLITS

    def _run_parts(self, number: int, holding: Array) -> bool:
        """Where whole CTAs part ways at the end of block `number`, run one kind after the other, each undivided.

        Those that leave a loop go first: what the others still wait for in it, such as a lock, may be theirs to give.
        """
        end = self.program.blocks[number].end
        whole = holding.all(1)
        if isinstance(end, Wait) or not self._can_part() or (whole != holding.any(1)).any():
            return False
        ways = [(~whole, number + 1)]
        if isinstance(end, Jump):
            ways.insert(1 if end.target <= number else 0, (whole, end.target))
        for ctas, block in ways:
            self.part(np.flatnonzero(ctas)).run(block)
        return True

    def run(self, first: int = 0) -> None:
        """Run the batch from block `first` to its end."""
        block: int | None = first
        live: Array | None = None
        if self.schedule is not None:
            block, live = self._interleaved(np.full(self.shape, first, np.int32))
        while block is not None:
            block, live = self._together(block, live)
        self._end(~self.has_ended)

    def _execute(self, block: Block, mask: Array | None) -> None:
        warps = self.ctas * self.warps
        if mask is not None:
            warps = int(mask.reshape(-1, 32).any(1).sum())
        self.counters.warp_instructions += warps * block.size
        number = block.first
        try:
            if not self.pending_registers and not block.starts_products:
                for number, action in enumerate(block.body, block.first):  # noqa: B007  (the handler reads it)
                    action(self, mask)
                return
            uses = zip(block.body, block.uses, strict=True)
            for number, (action, use) in enumerate(uses, block.first):  # noqa: B007
                if self.checker is not None and not (
                    self.pending_registers.isdisjoint(use.touched) and self.pending_inputs.isdisjoint(use.written)
                ):
                    self._check_use(use, mask)
                action(self, mask)
        except EmulationError as error:
            raise error.located(self.kernel.where(number)) from None

    def perform(self, number: int, action: Action, mask: Array | None) -> None:
        """Execute instruction `number`, which ends a block, on the lanes of the mask."""
        if self.checker is not None and (self.pending_registers or self.pending_inputs):
            self._check_use(use_of(number, self.kernel.instructions[number]), mask)
        try:
            action(self, mask)
        except EmulationError as error:
            raise error.located(self.kernel.where(number)) from None

    def _check_use(self, use: Use, mask: Array | None) -> None:
        """Report an instruction that touches registers of a wgmma that its warpgroups have not waited for."""
        for kind, mine, theirs in (
            ("register of a pending wgmma used", use.touched, "registers"),
            ("input register of a pending wgmma overwritten", use.written, "inputs"),
        ):
            for product in self.of(Products).flying:
                if mine.isdisjoint(getattr(product, theirs)):
                    continue
                groups = product.active
                if mask is not None:
                    groups = groups & np.broadcast_to(mask, self.shape).reshape(*groups.shape, -1).any(2)
                if groups.any() and self.checker is not None:
                    self.checker.note(kind, use.number, product.number, int(np.flatnonzero(groups.any(1))[0]))
                    break

    def _holding(self, end: Jump | Leave | Wait, mask: Array | None) -> Array | bool:
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
            elif holding is not True or (isinstance(end, Wait) and not end.together(self, live)):
                if live is None and not isinstance(holding, bool) and self._run_parts(number, holding):
                    return None, None
                return self._apart(number, live, holding)
            elif isinstance(end, Jump):
                number = end.target
            elif isinstance(end, Leave):
                return None, None
            else:
                number += 1
        return None, None

    def _apart(self, number: int, live: Array | None, holding: Array | bool) -> tuple[int | None, Array | None]:
        """Run lanes that are at different blocks, lowest block first, until they meet again or leave.

        The block `number` has just been executed by the live lanes; `holding` are those for which its end applies.
        """
        at = np.full(self.shape, number, np.int32)
        active = np.ones(self.shape, bool) if live is None else live
        at[~active] = DONE
        self._part(self.program.blocks[number].end, number, active, holding, at)
        return self._interleaved(at)

    def _interleaved(self, at: Array) -> tuple[int | None, Array | None]:
        """Run lanes from the blocks `at`, until they meet at one or have all left."""
        blocks = self.program.blocks
        self.live: Array = at < DONE
        turns = Turns(self)
        while True:
            self._settle()
            if not self.live.any():
                return None, None
            runnable = self._runnable()
            chosen = turns.among(runnable) if self.schedule is None else self.schedule.choose(self, runnable)
            number = int(at[chosen].min())
            active = chosen & (at == number)
            if number >= len(blocks):
                at[active] = DONE
                self.live = at < DONE
                continue
            count = int(active.sum())
            if self.schedule is None and count == int(self.live.sum()):
                return number, None if count == self.lanes else active
            self._execute(blocks[number], active)
            end = blocks[number].end
            self._part(end, number, active, False if end is None else self._holding(end, active), at)
            if isinstance(end, Jump) and end.target <= number:
                turns.jumped_back(active & (at == end.target), runnable)

    def _runnable(self) -> Array:
        """The lanes that may go on: none that sleeps, and one whose test has failed only where no other can."""
        if self.schedule is not None and self.landing == "random" and self.schedule.lands():
            self.of(Bulk).land_one()
        while True:
            awake = self.live & (self.asleep < 0)
            eager = awake & (self.polling < 0)
            if eager.any():
                return eager
            if not self.of(Bulk).land_one():
                self.rounds = 0 if self.progress != self.rounds_since else self.rounds + 1
                self.rounds_since = self.progress
                if (not awake.any() or self.rounds > FRUITLESS) and not self._time_passes():
                    self._deadlock()
            self.polling[:] = -1

    def _part(self, end: Any, number: int, active: Array, holding: Array | bool, at: Array) -> None:
        """Move the active lanes past the end of block `number`."""
        at[active] = number + 1
        if end is None or holding is False:
            return
        moved = active if holding is True else holding
        if isinstance(end, Jump):
            at[moved] = end.target
        elif isinstance(end, Leave):
            at[moved] = DONE
            self.live = at < DONE
        else:
            try:
                self.asleep[end.enter(self, moved)] = number
            except EmulationError as error:
                raise error.located(self.kernel.where(end.at)) from None

    def _settle(self) -> None:
        """Wake the lanes whose wait has ended."""
        for part in list(self.parts.values()):
            part.settle(self)
        ended = ~self.live.any(1) & ~self.has_ended
        if ended.any():
            self._end(ended)

    def _end(self, ended: Array) -> None:
        """CTAs have left."""
        self.has_ended |= ended
        if self.program.clocked:
            check_exits(self, ended)
            self.of(Bulk).ended(ended)

    def _time_passes(self) -> bool:
        """In a kernel that reads %globaltimer a thread that waits may give up: every `try_wait` says no after a second.

        Whether one did; not after LONGEST seconds.
        """
        if self.nanoseconds >= LONGEST * SECOND or not self.program.timed:
            return False
        self.nanoseconds += SECOND
        return self.of(MBarriers).give_up()

    def _deadlock(self) -> None:
        """Every live lane sleeps, and nothing is left that could wake one."""
        told = []
        ends = [block.end for block in self.program.blocks if isinstance(block.end, Wait)]
        tests = [(end, self.live & (self.polling == end.at)) for end in ends]
        for end, lanes in [*self.sleepers(self.live), *((end, lanes) for end, lanes in tests if lanes.any())]:
            line = self.kernel.where(end.at)
            told.append(end.tell(self, lanes) + (f" ({line})" if line else ""))
        raise Deadlock("no thread can go on: " + "; ".join(told))
