"""The machine that runs one batch of CTAs by compiled operations, and by the interpreter where there are none."""

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Self

import numpy as np

from ptx_emulator.core import execute
from ptx_emulator.core.checks import Checker
from ptx_emulator.core.decode import Action
from ptx_emulator.core.errors import EmulationError
from ptx_emulator.core.execute import Machine
from ptx_emulator.core.program import Block, Program
from ptx_emulator.core.spaces import Array
from ptx_emulator.native.checks import NativeChecker
from ptx_emulator.native.desk import Desk
from ptx_emulator.native.library import (
    APART,
    COUNTERS,
    CTA_OF_FINDING,
    FAILED,
    FINISHED,
    WORDS,
    Batch,
    NotBuilt,
    library,
)
from ptx_emulator.native.products import Compiled
from ptx_emulator.native.program import NativeProgram, Segment, native_program, parted_program
from ptx_emulator.native.registers import Registers

LANES_ALONE = 2048
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NativeMachine(Machine):
    """`Machine` with the registers, and the checks of shared memory, where compiled code reaches them."""

    sees_lanes = False

    native: NativeProgram
    checker: Checker | None
    step: int
    trace: list[int]
    desk: Desk
    page: Array  # immediates, and predefined registers that are equal in all CTAs
    buffers: Array  # where those of global memory begin, and where they end

    @classmethod
    def built(cls) -> bool:
        """Whether its compiled code is there."""
        try:
            library()
        except NotBuilt:
            return False
        return True

    @classmethod
    def lanes_of_batch(cls, program: Program, threads: int, cluster: int) -> int:
        """Few where CTAs run alone, so that what they touch stays in cache; else as many as the interpreter has."""
        native = native_program(program, threads, not program.clocked and cluster == 1)
        return LANES_ALONE if native.whole else super().lanes_of_batch(program, threads, cluster)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        shared = not self.program.clocked and self.cluster == 1
        encoded = native_program if self.schedule is None else parted_program
        self.native = encoded(self.program, self.threads, shared)
        if shared and self.checker is not None:
            self.checker = NativeChecker(self, self.program.granule)
        encoder, total = self.native.encoder, self.native.places.total * self.threads
        first = self.r
        memory = np.zeros((self.ctas, -(-total // 64) * 64), np.uint8)
        widths = [one.dtype.itemsize for one in first]
        self.r: Registers = Registers(first, memory, self.threads, encoder.place, widths)
        kept = {number for number in self.program.decoder.specials if number in encoder.place}
        self.r.written = set(self.native.entry) | kept
        self.r.put(None)
        self._hand_over()

    def _hand_over(self) -> None:
        """Tell the compiled machine where everything of this batch is."""
        checker = self.checker if isinstance(self.checker, NativeChecker) else None
        ends = [(buffer.start, buffer.start + buffer.size) for buffer in self.memory.buffers]
        self.buffers = np.array(ends, np.int64).reshape(-1, 2).T.copy()
        b = Batch(ctas=self.ctas, threads=self.threads)
        self.page = self.native.encoder.constants(self.r)
        b.registers, b.register_bytes = self.r.memory.ctypes.data, self.r.memory.shape[1]
        b.constants, b.extra = self.page.ctypes.data, self.native.lists.ctypes.data
        b.heap, b.buffers = self.memory.heap.ctypes.data, self.buffers.shape[1]
        b.starts, b.stops = self.buffers[0].ctypes.data, self.buffers[1].ctypes.data
        b.shared, b.shared_stride, b.shared_end = self.shared.data.ctypes.data, self.shared.stride, self.shared.size
        b.parameters, b.parameter_bytes = self.parameters.ctypes.data, len(self.parameters)
        b.bank, b.bank_bytes = self.constants.ctypes.data, len(self.constants)
        if checker is not None:
            b.checks, b.granule, b.granules = 1, checker.granule, checker.count
            b.tags, b.seen = checker.tags.ctypes.data, checker.seen.ctypes.data
            b.operand, b.all_operands = checker.operand.ctypes.data, checker.operands.ctypes.data
            b.fence = checker.fence.ctypes.data
            b.epochs = checker.epochs.ctypes.data
            checker.prepare = self._prepare
        self.desk = Desk(b, self.native.encoder)
        self.of(Compiled).batch = self.desk.batch

    def part(self, ctas: Array) -> Self:
        """A machine that goes on with some of the CTAs, where nothing is in flight."""
        other = super().part(ctas)
        other.r = self.r.part(ctas, lambda value: value[ctas] if value.shape[0] == self.ctas else value)
        if isinstance(other.checker, NativeChecker):
            other.checker.take(ctas)
        other._hand_over()
        return other

    def _can_part(self) -> bool:
        """Whether nothing is in flight and few parts have been made; each CTA has its own race account."""
        idle = all(part.may_part() for part in self.parts.values()) and self.schedule is None
        idle = idle and not self.program.clocked and self.cluster == 1 and library().flying(self.desk.copies) == 0
        return self.ctas > 1 and idle and self.splits < execute.MAX_SPLITS

    def set(self, register: int, value: Array, mask: Array | None) -> None:
        """Write `value` to the lanes of the mask."""
        super().set(register, value, mask)
        self.r.put(mask)

    def perform(self, number: int, action: Action, mask: Array | None) -> None:
        """Execute instruction `number`, which ends a block, on the lanes of the mask."""
        super().perform(number, action, mask)
        self.r.put(mask)

    def run(self, first: int = 0) -> None:
        """Run the batch from block `first` to its end, and add up what it has done."""
        if first == 0 and self.splits == 0 and self.native.whole and self.schedule is None:
            self._run_alone()
            self._end(~self.has_ended)
        else:
            super().run(first)
        self._add_up(self.desk)

    def _run_alone(self) -> None:
        """Run every CTA to its end, several at a time. Raises the error of the first of those that end with one."""
        count = min(THREADS, self.ctas)
        desks = [self.desk, *(Desk(self.desk.batch, self.native.encoder) for _ in range(count - 1))]
        turns = iter(range(self.ctas))
        errors: list[tuple[int, BaseException]] = []
        lock = Lock()

        def work(desk: Desk) -> None:
            with np.errstate(all="ignore"):
                for cta in turns:
                    if errors:
                        return
                    try:
                        self._walk(desk, cta, lock)
                    except BaseException as error:  # raised again below
                        errors.append((cta, error))

        if count == 1:
            work(self.desk)
        else:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(work, desks))
        if errors:
            raise min(errors, key=lambda found: found[0])[1]
        findings = np.concatenate([desk.news() for desk in desks])
        if isinstance(self.checker, NativeChecker):
            self.checker.found(findings[np.argsort(findings[:, CTA_OF_FINDING], kind="stable")])
        for desk in desks[1:]:
            self._add_up(desk)

    def _walk(self, desk: Desk, cta: int, lock: Lock) -> None:
        """Run one CTA; where the compiled machine cannot follow its threads, a machine of its own goes on with it."""
        native, batch, blocks = self.native, desk.batch, self.program.blocks
        table = native.table.ctypes.data
        outcome = library().walk(batch, table, len(blocks), native.operations.ctypes.data, cta)
        if outcome == FINISHED:
            return
        with lock:
            self.r.stale |= native.written
            if outcome == FAILED:
                self.trace, self.step = desk.trace(), batch.step
                here = np.zeros(self.shape, bool)
                here[cta] = desk.at == batch.block
                self._fail(desk, blocks[batch.block], native.operations, here)
            self._alone(desk, cta, outcome)

    def _alone(self, desk: Desk, cta: int, outcome: int) -> None:
        """Go on with a CTA that has come some way."""
        native, batch = self.native, desk.batch
        if native.encoder.alone:
            if not library().idle(batch.products):
                raise RuntimeError(
                    "the threads of a CTA part while wgmma products are in flight, which engine='native' does not "
                    "follow: use engine='interpreter'"
                )
            self.native = parted_program(self.program, self.threads)
        other = self.part(np.array([cta]))
        self.native = native
        other.step, other.trace = batch.step, desk.trace()
        if other.checker is not None:
            other.checker.floor = batch.floor
        library().take(other.desk.copies, desk.copies, cta, self.threads)
        number: int | None = batch.block
        live: Array | None = None
        if outcome == APART:
            number, live = other._interleaved(desk.at[None].copy())
        while number is not None:
            number, live = other._together(number, live)
        other._end(~other.has_ended)
        other._add_up(other.desk)

    def _add_up(self, desk: Desk) -> None:
        """Tell the launch's counters what the compiled machine has counted."""
        counters = self.counters
        for name, count in zip(COUNTERS, desk.counted.tolist(), strict=False):
            setattr(counters, name, getattr(counters, name) + count)
        for kind, flops in zip(self.native.encoder.kinds, desk.counted[len(COUNTERS) :].tolist(), strict=True):
            if flops:
                counters.tensor(kind, flops)
        desk.counted[:] = 0

    def _execute(self, block: Block, mask: Array | None) -> None:
        warps = self.ctas * self.warps
        if mask is not None:
            warps = int(mask.reshape(-1, 32).any(1).sum())
        self.counters.warp_instructions += warps * block.size
        number = block.first
        try:
            for item in self.native.blocks[block.first]:
                if isinstance(item, Segment):
                    number = block.first + item.first
                    self._check_uses(block, item.first, item.stop, mask)
                    number = self._run(block, item, mask)
                    continue
                number = block.first + item
                self._check_uses(block, item, item + 1, mask)
                product = self.native.products.get(number)
                if product is None:
                    self.interpreted[self.kernel.instructions[number].root] += warps
                    block.body[item](self, mask)
                else:
                    product(self, mask)
                self.r.put(mask)
                self._collect()
        except EmulationError as error:
            raise error.located(self.kernel.where(number)) from None

    def _check_uses(self, block: Block, first: int, stop: int, mask: Array | None) -> None:
        """Report the instructions from `first` to `stop` of the block that touch registers of a pending wgmma."""
        if self.checker is None or not (self.pending_registers or self.pending_inputs):
            return
        for use in block.uses[first:stop]:
            if not self.pending_registers.isdisjoint(use.touched) or not self.pending_inputs.isdisjoint(use.written):
                self._check_use(use, mask)

    def _run(self, block: Block, segment: Segment, mask: Array | None) -> int:
        """Run a segment; returns the number of its last instruction. Raises what the interpreter raises for one."""
        registers, batch = self.r, self.desk.batch
        lanes = None if mask is None else np.ascontiguousarray(np.broadcast_to(mask, self.shape))
        before = self.step
        self.step += len(segment.steps)
        self.trace += segment.steps
        self._prepare()
        address = None if lanes is None else lanes.ctypes.data
        done = library().run(batch, segment.address, segment.count, address, before)
        registers.stale |= segment.writes
        self._collect()
        if not done:
            cta = batch.cta_failed
            only = np.zeros(self.shape, bool)
            only[cta] = True if lanes is None else lanes[cta]
            self._fail(self.desk, block, segment.operations, only)
        return block.first + segment.stop - 1

    def _prepare(self) -> Batch:
        """Bring what the checks know to where the compiled machine reads it."""
        batch, checker = self.desk.batch, self.checker
        self.desk.follow(self.trace)
        if checker is not None:
            batch.floor = checker.floor
            batch.operands = batch.all_operands if self.pending_registers else None
        return batch

    def _collect(self) -> None:
        """Tell the checker what the compiled machine has found."""
        if self.desk.batch.found > self.desk.told and isinstance(self.checker, NativeChecker):
            self.checker.found(self.desk.news())

    def _fail(self, desk: Desk, block: Block, operations: Array, lanes: Array) -> None:
        """The machine has stopped at an instruction of one CTA: the interpreter says what is wrong with these lanes."""
        number = int(operations.reshape(-1)[WORDS * desk.batch.op_failed + 1])
        try:
            block.body[number - block.first](self, lanes)
        except EmulationError as error:
            raise error.located(self.kernel.where(number)) from None
        raise RuntimeError(
            f"the engines disagree: the machine cannot do what the interpreter can, in CTA "
            f"{int(self.cta_numbers[desk.batch.cta_failed])}: {self.kernel.instructions[number].text}"
        )
