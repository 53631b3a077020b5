"""Where each register of a kernel lies in the memory of a CTA: registers that are never needed at once share a place.

A place holds one register of every thread of the CTA. A register keeps its place from its first to its last use in the
order of the program, extended to the ends of every block at which it is live; so nothing depends on which lanes run.
"""

import heapq
import itertools
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
    found = Places()
    free: dict[int, list[int]] = {1: [], 2: [], 4: [], 8: []}
    ending: list[tuple[int, int]] = []  # a heap
    for register, first, last in zip(*_intervals(program, accesses, live, len(widths)), strict=True):
        while ending and ending[0][0] < first:
            _, other = heapq.heappop(ending)
            free[widths[other]].append(found.offset[other])
        width = widths[register]
        if register in alone:
            found.add(register, width)
            continue
        if free[width]:
            found.offset[register] = free[width].pop()
        else:
            found.add(register, width)
        heapq.heappush(ending, (last, register))
    return found, live[0][0] if live else frozenset()


def _intervals(
    program: Program, accesses: Accesses, live: list[tuple[frozenset[int], frozenset[int]]], count: int
) -> tuple[list[int], list[int], list[int]]:
    """The registers that are named, and the first and the last instruction between which each is needed, by these."""
    firsts, lasts = np.full(count, len(program.kernel.instructions)), np.full(count, -1)
    for register, at in ((accesses.reads, accesses.read_at), (accesses.writes, accesses.write_at)):
        np.minimum.at(firsts, register, at)
        np.maximum.at(lasts, register, at)
    for block, edges in zip(program.blocks, live, strict=True):
        for registers, edge in zip(edges, (block.first, block.first + max(block.size, 1) - 1), strict=True):
            some = np.fromiter(registers, np.int64, len(registers))
            firsts[some], lasts[some] = np.minimum(firsts[some], edge), np.maximum(lasts[some], edge)
    named = np.flatnonzero(lasts >= 0)
    order = named[np.lexsort((lasts[named], firsts[named]))]
    return order.tolist(), firsts[order].tolist(), lasts[order].tolist()


def _live(program: Program, accesses: Accesses, registers: int) -> list[tuple[frozenset[int], frozenset[int]]]:
    """The registers that are live where each block begins and where it ends."""
    uses, kills = _uses_and_kills(program.blocks, accesses, registers)
    follow, count = [], len(program.blocks)
    for number, block in enumerate(program.blocks):
        end = block.end
        after = [number + 1] if not isinstance(end, Jump | Leave) or end.guard is not None else []
        if isinstance(end, Jump):
            after.append(end.target)
        follow.append([n for n in after if n < count])
    live_in: list[frozenset[int]] = [frozenset()] * count
    live_out = list(live_in)
    changed = True
    while changed:
        changed = False
        for number in reversed(range(count)):
            out = frozenset().union(*(live_in[n] for n in follow[number]))
            if out != live_out[number] or not live_in[number]:
                new = frozenset(uses[number] | (out - kills[number]))
                changed |= new != live_in[number]
                live_in[number], live_out[number] = new, out
    return list(zip(live_in, live_out, strict=True))


def _uses_and_kills(
    blocks: list[Block], accesses: Accesses, registers: int
) -> tuple[list[frozenset[int]], list[frozenset[int]]]:
    """The registers that each block reads before it writes them, and those that it writes."""
    firsts = np.array([block.first for block in blocks], np.int64)
    # Numbers of (block, register), and the first instruction with each.
    reads, read_at = _first(accesses.reads, accesses.read_at, firsts, registers)
    writes, write_at = _first(accesses.writes, accesses.write_at, firsts, registers)
    place = np.searchsorted(writes, reads)
    place[place == len(writes)] = 0
    later = writes[place] != reads if len(writes) else np.ones(len(reads), bool)
    used = reads[later | (write_at[place] >= read_at)] if len(writes) else reads
    return _by_block(used, len(blocks), registers), _by_block(writes, len(blocks), registers)


def _first(register: Array, at: Array, firsts: Array, registers: int) -> tuple[Array, Array]:
    block = np.searchsorted(firsts, at, "right") - 1
    keys, places = np.unique(block * registers + register, return_index=True)
    return keys, at[places]


def _by_block(keys: Array, blocks: int, registers: int) -> list[frozenset[int]]:
    edges = np.searchsorted(keys, np.arange(blocks + 1) * registers).tolist()
    found = (keys % registers).tolist() if len(keys) else []
    return [frozenset(found[low:high]) for low, high in itertools.pairwise(edges)]
