"""Where each register of a kernel lies in the memory of a CTA: registers that are never needed at once share a place.

A place holds one register of every thread of the CTA. A register keeps its place from its first to its last use in the
order of the program, extended to the ends of every block at which it is live; so nothing depends on which lanes run.
"""

import heapq
from dataclasses import dataclass, field

from ptx_emulator.core.program import Jump, Leave, Program
from ptx_emulator.core.syntax import Address, Instruction, Tile, registers_in


@dataclass(frozen=True)
class Access:
    """The registers that an instruction reads and writes. One that it may write for some lanes only counts as read."""

    reads: frozenset[int]
    writes: frozenset[int]

    @property
    def named(self) -> frozenset[int]:
        """Both."""
        return self.reads | self.writes


def access_of(ins: Instruction) -> Access:
    """What an instruction reads and writes, its guard among it."""
    named = [registers_in(operand) for operand in ins.operands]
    nothing: frozenset[int] = frozenset()
    plain = ins.root in ("bar", "barrier") and "red" not in ins.modifiers  # its first operand is read
    writes = named[0] if named and not plain and not isinstance(ins.operands[0], Address | Tile) else nothing
    reads = nothing.union(*named[1:]) if writes else nothing.union(*named)
    if ins.guard is not None:
        reads |= writes | {ins.guard.index}
    if ins.root == "wgmma":
        reads |= writes
    return Access(reads, writes)


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
    program: Program, accesses: list[Access], widths: list[int], alone: frozenset[int]
) -> tuple[Places, frozenset[int]]:
    """Give every register that the kernel names a place; those of `alone` share theirs with none.

    Returns:
        The places, and the registers that may be read before they are written.
    """
    live = _live(program, accesses)
    found = Places()
    free: dict[int, list[int]] = {1: [], 2: [], 4: [], 8: []}
    ending: list[tuple[int, int]] = []  # a heap
    for register, (first, last) in sorted(_intervals(program, accesses, live).items(), key=lambda item: item[1]):
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
    program: Program, accesses: list[Access], live: list[tuple[frozenset[int], frozenset[int]]]
) -> dict[int, tuple[int, int]]:
    """The first and the last instruction between which a register is needed."""
    firsts: dict[int, int] = {}
    lasts: dict[int, int] = {}
    for number, access in enumerate(accesses):
        for register in access.named:
            firsts.setdefault(register, number)
            lasts[register] = number
    starts: dict[int, int] = {}  # the first place at which a register is live at an edge of a block, and the last
    stops: dict[int, int] = {}
    edges = [(block.first, block.first + max(block.size, 1) - 1) for block in program.blocks]
    for (first, last), (live_in, live_out) in zip(edges, live, strict=True):
        stops.update(dict.fromkeys(live_in, first))
        stops.update(dict.fromkeys(live_out, last))
    for (first, last), (live_in, live_out) in zip(reversed(edges), reversed(live), strict=True):
        starts.update(dict.fromkeys(live_out, last))
        starts.update(dict.fromkeys(live_in, first))
    for register, start in starts.items():
        firsts[register] = min(firsts[register], start)
        lasts[register] = max(lasts[register], stops[register])
    return {register: (first, lasts[register]) for register, first in firsts.items()}


def _live(program: Program, accesses: list[Access]) -> list[tuple[frozenset[int], frozenset[int]]]:
    """The registers that are live where each block begins and where it ends."""
    uses, kills, follow = [], [], []
    count = len(program.blocks)
    for number, block in enumerate(program.blocks):
        use: set[int] = set()
        kill: set[int] = set()
        for access in accesses[block.first : block.first + block.size]:
            use |= access.reads - kill
            kill |= access.writes
        uses.append(use)
        kills.append(kill)
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
