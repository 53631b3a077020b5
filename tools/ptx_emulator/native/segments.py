"""The operations of a kernel: those of each block, cut where the interpreter must execute an instruction."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from ptx_emulator.core.program import Program
from ptx_emulator.core.spaces import Array
from ptx_emulator.native.encode import Encoder
from ptx_emulator.native.library import WORDS
from ptx_emulator.native.liveness import Accesses
from ptx_emulator.native.patterns import Pattern, Patterns, Row
from ptx_emulator.native.ragged import Ragged

_SHIFT = 8  # of the place of a gap and of its kind, over the number of its register among those of its instruction


@dataclass
class Segment:
    """Operations that the machine runs in one go. `first`, `stop`: places of their instructions in the block's body."""

    first: int
    stop: int
    operations: Array = field(default_factory=lambda: np.zeros((0, WORDS), np.int32))
    steps: list[int] = field(default_factory=list)  # instructions that access shared memory, in order
    written: Callable[[], frozenset[int]] = frozenset

    def __post_init__(self) -> None:
        self.address: int = self.operations.ctypes.data
        self.count: int = len(self.operations)

    @cached_property
    def writes(self) -> frozenset[int]:
        """The registers that the operations write."""
        return self.written()


def cut(program: Program, accesses: Accesses, encoder: Encoder) -> dict[int, list[Segment | int]]:
    """First instruction of a basic block -> its segments in order, and between them the places in the block's body of
    instructions that the interpreter executes."""
    patterns = Patterns(encoder, program.kernel.instructions)
    ranges = [range(block.first, block.first + len(block.body)) for block in program.blocks]
    numbers = np.array([number for some in ranges for number in some], np.int64)
    operations = _Operations(encoder, program, numbers, [patterns.of(number) for some in ranges for number in some])
    found: dict[int, list[Segment | int]] = {}
    first = 0
    for block in program.blocks:
        found[block.first] = operations.segments(first, len(block.body), accesses)
        first += len(block.body)
    return found


class _Operations:
    """The words of all operations of a kernel. numbers: of the instructions; patterns: of each."""

    def __init__(self, encoder: Encoder, program: Program, numbers: Array, patterns: list[Pattern]) -> None:
        code = program.kernel.instructions
        every = {id(pattern): pattern for pattern in patterns}
        kinds = {identity: kind for kind, identity in enumerate(every)}
        kind = np.array([kinds[id(pattern)] for pattern in patterns], np.int64)
        rows = [row for pattern in every.values() for row in pattern]
        counts = np.array([0, *map(len, every.values())], np.int64)
        which, owner = Ragged(np.arange(len(rows)), np.cumsum(counts)).gather(kind)
        self.numbers: list[int] = numbers.tolist()
        operations = counts[1:][kind]  # of each instruction
        self.ends: list[int] = np.append(0, np.cumsum(operations)).tolist()
        self.gaps: list[int] = np.flatnonzero(operations == 0).tolist()  # what the interpreter is to execute
        owners = numbers[owner]  # the instruction of each operation
        steps = np.array([row.steps for row in rows], bool)[which]
        self.stepped: list[int] = np.append(0, np.cumsum(steps)).tolist()  # how many steps are before each operation
        self.stepping: list[int] = owners[steps].tolist()  # the instruction of each step
        self.words = np.array([row.words for row in rows], np.int32).reshape(-1, WORDS)[which]
        self.words[:, 1] = owners
        self.words[:, 4] = np.where(steps, self.stepped[1:], 0)  # `_segment` counts from its first one
        self._fill(rows, which, encoder, owners, np.array(code.starts, np.int64), np.array(code.numbers, np.int64))

    def _fill(
        self, rows: list[Row], which: Array, encoder: Encoder, owners: Array, starts: Array, registers: Array
    ) -> None:
        """Write the operands of the registers into the gaps."""
        count = max(encoder.place, default=0) + 1
        values = np.zeros(2 * count, np.int64)  # the operand of each register, its number among the watched
        for register, place in encoder.place.items():
            if register >= 0:
                values[register] = place * encoder.threads
        for register, number in encoder.watched.items():
            values[count + register] = number
        gaps = Ragged.of(
            [(2 * place + kind) << _SHIFT | register for place, register, kind in row.gaps] for row in rows
        )
        packed, owner = gaps.gather(which)
        begin = starts[owners]
        named = registers[begin[owner] + (packed & (1 << _SHIFT) - 1)]
        self.words[owner, packed >> _SHIFT + 1] = values[named + count * (packed >> _SHIFT & 1)]
        listed = np.array([bool(row.lists) for row in rows], bool)[which]
        for operation in np.flatnonzero(listed).tolist():
            for place, operands, holes in rows[which[operation]].lists:
                filled = list(operands)
                for at, register, kind in holes:
                    filled[at] = int(values[registers[begin[operation] + register] + count * kind])
                self.words[operation, place] = encoder.list_of(filled)

    def segments(self, first: int, count: int, accesses: Accesses) -> list[Segment | int]:
        """Those of `count` instructions from the how-manyth on, which are a block's body."""
        found: list[Segment | int] = []
        begin, stop = first, first + count
        low, high = bisect_left(self.gaps, first), bisect_left(self.gaps, stop)
        for index in [*self.gaps[low:high], stop]:
            if begin < index:
                found.append(self._segment(first, begin, index, accesses))
            if index < stop:
                found.append(index - first)
            begin = index + 1
        return found

    def _segment(self, first: int, begin: int, stop: int, accesses: Accesses) -> Segment:
        """Of the instructions from the how-manyth on; `first` is that of the block."""
        low, high = self.ends[begin], self.ends[stop]
        before, after = self.stepped[low], self.stepped[high]
        words = self.words[low:high]
        if before < after:
            words[:, 4] -= np.where(words[:, 4] > 0, before, 0)
        steps = self.stepping[before:after]
        written = partial(accesses.written, self.numbers[begin], self.numbers[stop - 1] + 1)
        return Segment(begin - first, stop - first, words, steps, written)
