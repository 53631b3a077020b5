"""Where each register of a kernel lies in the memory of a CTA: registers that are never needed at once share a place.

A place holds one register of every thread of the CTA. A register keeps its place from its first to its last use in the
order of the program, extended to the ends of every block at which it is live; so nothing depends on which lanes run.
"""

from dataclasses import dataclass, field

import numpy as np

from ptx_emulator.core.code import Code, Form
from ptx_emulator.core.program import Block, Jump, Leave, Program
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.syntax import Address, Instruction, Tile, registers_in
from ptx_emulator.native.ragged import Ragged


def places_of(form: Form) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which of its registers an instruction of a form reads, its guard among them, and which it writes.

    One that it may write for some lanes only counts as read, too.
    """
    if form.access is None:
        form.access = _read_access(form.example)
    return form.access


def writes_first(ins: Instruction) -> bool:
    """Whether an instruction writes its first operand."""
    plain = ins.root in ("bar", "barrier") and "red" not in ins.modifiers
    return bool(ins.operands) and not plain and not isinstance(ins.operands[0], Address | Tile)


def _read_access(ins: Instruction) -> tuple[tuple[int, ...], tuple[int, ...]]:
    named = [registers_in(operand) for operand in ins.operands]
    nothing: frozenset[int] = frozenset()
    writes = named[0] if writes_first(ins) else nothing
    reads = nothing.union(*named[1:]) if writes else nothing.union(*named)
    if ins.guard is not None:
        reads |= writes | {ins.guard.index}
    if ins.root == "wgmma":
        reads |= writes
    return tuple(sorted(reads)), tuple(sorted(writes))


@dataclass
class Accesses:
    """Which instructions read and write which registers, in the order of the instructions."""

    reads: Array  # registers
    read_at: Array  # instructions
    writes: Array
    write_at: Array

    @classmethod
    def of(cls, code: Code) -> "Accesses":
        """Those of a kernel."""
        forms = dict.fromkeys(code.forms)
        kinds = {form: kind for kind, form in enumerate(forms)}
        kind = np.array([kinds[form] for form in code.forms], np.int64)
        starts, numbers = np.array(code.starts, np.int64), np.array(code.numbers, np.int64)
        found = []
        for which in (0, 1):
            places, at = Ragged.of(places_of(form)[which] for form in forms).gather(kind)
            found += [numbers[starts[at] + places], at]
        return cls(*found)

    def written(self, first: int, stop: int) -> frozenset[int]:
        """The registers that the instructions from `first` to `stop` write."""
        low, high = np.searchsorted(self.write_at, (first, stop))
        return frozenset(self.writes[low:high].tolist())


@dataclass
class Places:
    """The byte at which each register begins, and all bytes of a CTA, both for each thread: times the threads."""

    offset: dict[int, int] = field(default_factory=dict)
    total: int = 0

    def add(self, register: int, width: int) -> None:
        """A place of its own."""
        self.offset[register] = self.total
        self.total += width


def place(
    program: Program, accesses: Accesses, widths: list[int], alone: frozenset[int]
) -> tuple[Places, frozenset[int]]:
    """Give every register that the kernel names a place; those of `alone` share theirs with none.

    Returns:
        The places, and the registers that may be read before they are written.
    """
    live = _live(program, accesses, len(widths))
    firsts, lasts = _intervals(program, accesses, live, len(widths))
    named = np.flatnonzero(lasts >= 0)
    ending = named[np.argsort(lasts[named], kind="stable")].tolist()
    begin, end, ended = firsts.tolist(), lasts.tolist(), 0
    found = Places()
    offset = found.offset
    free: dict[int, list[int]] = {1: [], 2: [], 4: [], 8: []}
    for register in named[np.argsort(firsts[named], kind="stable")].tolist():
        while end[ending[ended]] < begin[register]:
            other = ending[ended]
            ended += 1
            if other not in alone:
                free[widths[other]].append(offset[other])
        width = widths[register]
        if free[width] and register not in alone:
            offset[register] = free[width].pop()
        else:
            found.add(register, width)
    return found, frozenset(live.registers[live.begin[0]].tolist()) if len(live.begin) else frozenset()


@dataclass
class Live:
    """Which registers are live where each block begins and where it ends, of those that any block takes over."""

    registers: Array
    begin: Array  # [blocks, registers]
    end: Array


def _intervals(program: Program, accesses: Accesses, live: Live, count: int) -> tuple[Array, Array]:
    """The first and the last instruction between which each register is needed; the last is -1 where it has no name."""
    firsts, lasts = np.full(count, len(program.kernel.instructions)), np.full(count, -1)
    for register, at in ((accesses.reads, accesses.read_at), (accesses.writes, accesses.write_at)):
        np.minimum.at(firsts, register, at)
        np.maximum.at(lasts, register, at)
    first = np.array([block.first for block in program.blocks], np.int64)
    last = first + np.array([max(block.size, 1) - 1 for block in program.blocks], np.int64)
    for edge, there in ((first, live.begin), (last, live.end)):
        block, which = np.nonzero(there)
        np.minimum.at(firsts, live.registers[which], edge[block])
        np.maximum.at(lasts, live.registers[which], edge[block])
    return firsts, lasts


def _live(program: Program, accesses: Accesses, registers: int) -> Live:
    """The registers that are live where each block begins and where it ends."""
    blocks = program.blocks
    first = np.array([block.first for block in blocks], np.int64)
    # Numbers of (block, register), and the first instruction with each.
    reads, read_at = _first(accesses.reads, accesses.read_at, first, registers)
    writes, write_at = _first(accesses.writes, accesses.write_at, first, registers)
    place = np.searchsorted(writes, reads)
    unwritten = ~np.isin(reads, writes, assume_unique=True)
    used = reads[unwritten | (np.append(write_at, 0)[place] >= read_at)]  # before the block writes them
    columns = np.unique(used % max(registers, 1))
    uses, kills = (_sets(keys, len(blocks), registers, columns) for keys in (used, writes))
    begin, end = _flow(uses, kills, _followers(blocks))
    return Live(columns, _matrix(begin, len(columns)), _matrix(end, len(columns)))


def _first(register: Array, at: Array, firsts: Array, registers: int) -> tuple[Array, Array]:
    block = np.searchsorted(firsts, at, "right") - 1
    keys, places = np.unique(block * registers + register, return_index=True)
    return keys, at[places]


def _sets(keys: Array, blocks: int, registers: int, columns: Array) -> list[int]:
    """For each block a number, of which bit i says whether the i-th of the registers `columns` is among its keys."""
    block, register = np.divmod(keys, max(registers, 1))
    here = np.isin(register, columns)
    bits = np.zeros((blocks, len(columns)), bool)
    bits[block[here], np.searchsorted(columns, register[here])] = True
    return [int.from_bytes(row.tobytes(), "little") for row in np.packbits(bits, axis=1, bitorder="little")]


def _matrix(sets: list[int], columns: int) -> Array:
    """The bits of each number, [numbers, columns]."""
    size = -(-columns // 8)
    raw = np.frombuffer(b"".join(one.to_bytes(size, "little") for one in sets), np.uint8)
    return np.unpackbits(raw.reshape(len(sets), size), axis=1, count=columns, bitorder="little").astype(bool)


def _followers(blocks: list[Block]) -> list[list[int]]:
    """The blocks that may run after each."""
    found = []
    for number, block in enumerate(blocks):
        end = block.end
        after = [number + 1] if not isinstance(end, Jump | Leave) or end.guard is not None else []
        if isinstance(end, Jump):
            after.append(end.target)
        found.append([n for n in after if n < len(blocks)])
    return found


def _flow(uses: list[int], kills: list[int], follow: list[list[int]]) -> tuple[list[int], list[int]]:
    """The sets of registers that are live where each block begins, and where it ends."""
    begin, end = list(uses), [0] * len(uses)
    changed = True
    while changed:
        changed = False
        for number in reversed(range(len(uses))):
            after = 0
            for n in follow[number]:
                after |= begin[n]
            if after != end[number]:
                changed = True
                end[number], begin[number] = after, uses[number] | (after & ~kills[number])
    return begin, end
