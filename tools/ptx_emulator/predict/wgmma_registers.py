"""Registers of a wgmma that the machine code touches before it has waited: ptxas's mistake, which no PTX shows.

PTX says that a fragment of A in registers may not be written, and an accumulator not touched, before a
`wgmma.wait_group` that covers the wgmma. The emulator checks that of the PTX. ptxas allots the machine's registers
afterwards, and releases before 13.3 write into fragments of A ahead of the wait. On the machine a wgmma with `gsb0`
ends a group, `WARPGROUP.DEPBAR.LE gsb0, n` waits until at most n groups are under way, and the wgmmas have no read
barrier in their control bits, so nothing else orders a write behind them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ptx_emulator.predict.resources import Instruction, following, read_sass

_WGMMA = re.compile(r"[HQIB]GMMA\.64x(?P<columns>\d+)x\d+\.(?P<sum>\w+)")
#: Instructions whose first register is read: stores, branches, comparisons, and all of the uniform datapath.
_WRITES_NONE = re.compile(
    r"ST|RED\b|RED\.|BAR|LDGSTS|SYNCS|BRA|EXIT|\w*SETP|PLOP3|FCHK|R2P\b|WARP|CCTL|MEMBAR|FENCE|DEPBAR|NOP|U[A-Z]"
)
#: Registers of a fragment of A: 64 x 16 elements of 16 bits, or as many bytes of another type, by 128 threads.
_FRAGMENT = 4


class Touched(NamedTuple):
    """A register of a wgmma that may still be under way, touched."""

    instruction: str
    register: int
    role: str  # "operand": a fragment of A, written; "accumulator": read or written

    def __str__(self) -> str:
        done = "is written" if self.role == "operand" else "is used"
        return f"R{self.register}, {self.role} of a wgmma that may still be under way, {done}: {self.instruction}"


class _Group(NamedTuple):
    """Registers of wgmmas that are waited for together."""

    operands: frozenset[int] = frozenset()
    accumulators: frozenset[int] = frozenset()

    def joined(self, operands: frozenset[int], accumulators: frozenset[int]) -> _Group:
        return _Group(self.operands | operands, self.accumulators | accumulators)


#: Closed groups in their order, then the open one.
_Pending = tuple[_Group, ...]
#: Closed groups that are told apart; older ones are one. A loop that closes groups and never waits must end here.
_MOST_GROUPS = 8


def touched_early(listing: str) -> list[Touched]:
    """What nvdisasm's listing of a kernel touches before it has waited, on any path; each instruction once for a role.

    Raises:
        RuntimeError: a jump whose goal is not in the instruction, or a call while a wgmma is under way.
    """
    code, labels = read_sass(listing)
    found: dict[tuple[int, str], Touched] = {}
    seen: set[tuple[int, _Pending]] = set()
    paths: list[tuple[int, _Pending]] = [(0, (_Group(),))]
    while paths:
        at, pending = paths.pop()
        while at < len(code) and (at, pending) not in seen:
            seen.add((at, pending))
            instruction = code[at]
            for touch in _touched(instruction, pending):
                found.setdefault((at, touch.role), touch)
            pending = _after(instruction, pending)
            following = list(_following(at, instruction, labels, pending))
            if not following:
                break
            at, *others = following
            paths += [(other, pending) for other in others]
    return [found[key] for key in sorted(found)]


def _following(at: int, instruction: Instruction, labels: Mapping[str, int], pending: _Pending) -> Iterator[int]:
    """Where execution can go on."""
    if instruction.opcode.startswith("CALL") and any(any(group) for group in pending):
        raise RuntimeError(f"{instruction.opcode} {instruction.operands} while a wgmma is under way")
    return following(at, instruction, labels)


def _after(instruction: Instruction, pending: _Pending) -> _Pending:
    """What is under way behind the instruction."""
    *closed, opened = pending
    if _WGMMA.match(instruction.opcode):
        opened = opened.joined(_fragment(instruction), _written(instruction))
        if re.search(r"\bgsb\d", instruction.operands):
            if len(closed) == _MOST_GROUPS:
                closed = [closed[0].joined(*closed[1]), *closed[2:]]
            return (*closed, opened, _Group())
        return (*closed, opened)
    if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        left = int(instruction.operands.split(",")[-1].strip(), 16)
        return (*closed[max(len(closed) - left, 0) :], opened)
    return pending


def _touched(instruction: Instruction, pending: _Pending) -> Iterator[Touched]:
    operands = frozenset[int]().union(*(group.operands for group in pending))
    accumulators = frozenset[int]().union(*(group.accumulators for group in pending))
    if not operands and not accumulators:
        return
    text = f"{instruction.opcode} {instruction.operands}"
    written = _written(instruction)
    if early := written & operands:
        yield Touched(text, min(early), "operand")
    # A wgmma may add to what another one before it adds to: the tensor core keeps them in order.
    used = _fragment(instruction) if _WGMMA.match(instruction.opcode) else written | _read(instruction)
    if early := used & accumulators:
        yield Touched(text, min(early), "accumulator")


def _fragment(instruction: Instruction) -> frozenset[int]:
    """Registers of A, where a wgmma has it in registers."""
    second = instruction.operands.split(",")[1].strip()
    return _span(second, _FRAGMENT) if re.match(r"R\d", second) else frozenset()


def _read(instruction: Instruction) -> frozenset[int]:
    """Registers that are named among the operands."""
    return frozenset(int(number) for number in re.findall(r"\bR(\d+)", instruction.operands))


def _written(instruction: Instruction) -> frozenset[int]:
    """Registers that the instruction writes: those of its first operand that is no predicate."""
    if _WRITES_NONE.match(instruction.opcode):
        return frozenset()
    operands = (operand.strip() for operand in instruction.operands.split(","))
    first = next((operand for operand in operands if not re.match(r"!?U?P(T|\d)", operand)), "")
    return _span(first, _width(instruction.opcode.split("."))) if re.match(r"R\d", first) else frozenset()


def _span(operand: str, width: int) -> frozenset[int]:
    first = int(re.match(r"R(\d+)", operand)[1])  # type: ignore[index]
    return frozenset(range(first, first + width))


def _width(parts: Sequence[str]) -> int:
    """Registers of 32 bits of a result."""
    if product := _WGMMA.match(".".join(parts)):
        return int(product["columns"]) // (4 if product["sum"] == "F16" else 2)
    name = parts[0]
    if name == "HMMA":
        return 2 if parts[-1] == "F16" else 4
    if name == "LDSM":
        return int(parts[-1]) if parts[-1].isdigit() else 1
    if "128" in parts:
        return 4
    double = name in ("DADD", "DMUL", "DFMA") or (name == "CS2R" and "32" not in parts)
    return 2 if double or not {"64", "WIDE", "F64"}.isdisjoint(parts) else 1
