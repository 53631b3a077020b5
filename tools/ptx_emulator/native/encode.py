"""From instructions to operations of the vector machine. An instruction for which no encoder has one is interpreted.

The core has decoded every instruction before, so encoders meet valid forms only; what they do not know they decline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ptx_emulator.core.decode import Decoder
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.syntax import Instruction, Not, Operand, Register, Sink
from ptx_emulator.native.library import COUNTERS, NONE, OPERANDS, WORDS

MARK = 1 << 40  #: an operand of an instruction's first register, in a pattern; one more for each of the others
LIST = 1 << 41  #: the first list of operands made for a pattern; one more for each of the others
WATCH = 1 << 42  #: the number of an instruction's first register among the watched, in a pattern; one more for each
Encode = Callable[["Encoder", Instruction], "Operation | None"]
ENCODERS: dict[str, list[Encode]] = {}


@dataclass(frozen=True)
class Operation:
    """One instruction for the machine: the handler's name, its operands, and whether it accesses shared memory."""

    name: str
    operands: tuple[int, ...]
    steps: bool = False
    guarded: bool = True  # whether the instruction's guard holds for it


def encoder(*roots: str) -> Callable[[Encode], Encode]:
    """Register an encoder for opcodes. Encoders of one opcode are asked in turn; one that returns None declines."""

    def register(encode: Encode) -> Encode:
        for root in roots:
            ENCODERS.setdefault(root, []).append(encode)
        return encode

    return register


@dataclass
class Encoder:
    """Encodes the instructions of one kernel.

    place: byte of each register that a CTA keeps, for one thread. Immediates, and predefined registers that are equal
    in all CTAs, lie in a page of constants that all CTAs share; its operands are the complement of their place.
    """

    decoder: Decoder
    codes: dict[str, int]
    place: dict[int, int]
    threads: int
    shared: bool  # whether the machine may access shared memory, or only the interpreter
    alone: bool  # whether CTAs run alone, with wgmma
    watched: dict[int, int]  # registers of which wgmma's checks ask something, numbered
    sink: int = 0  # the place of what nobody reads
    keys: dict[tuple[int, ...], int] = field(default_factory=dict)  # accumulators of wgmma
    page: dict[int, int] = field(default_factory=dict)
    page_bytes: int = 0
    extra: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)  # of tensor-core instructions
    size: dict[int, int] = field(default_factory=dict)  # bytes of each number in the page
    marks: dict[int, int] = field(default_factory=dict)  # what stands for registers while a pattern is made
    marked: list[list[int]] = field(default_factory=list)  # lists made meanwhile

    def operation(self, ins: Instruction) -> Operation | None:
        """The operation of an instruction without its guard, or None where the interpreter is to execute it."""
        for encode in ENCODERS.get(ins.root, ()):
            found = encode(self, ins)
            if found is not None and found.name in self.codes:
                return found if self.shared or not found.steps else None
        return None

    def words(self, found: Operation, ins: Instruction) -> list[int]:
        """The operation as the machine reads it, but for the number of the instruction and of its step."""
        guard = NONE if ins.guard is None or not found.guarded else self.number(ins.guard.index)
        padding = (0,) * (OPERANDS - len(found.operands))
        words = [self.codes[found.name], 0, guard, int(ins.guard_negated), 0, *found.operands, *padding]
        assert len(words) == WORDS
        return words

    def number(self, register: int) -> int:
        """The operand for a register, an immediate or a predefined register, by the core's number."""
        if register in self.marks:
            return self.marks[register]
        if register in self.place:
            return self.place[register] * self.threads
        if register not in self.page:
            size = 1
            if register in self.decoder.constants:
                size = self.decoder.constants[register].dtype.itemsize
            elif register in self.decoder.specials:
                size = 4
            self.size[register] = size
            self.page[register] = self.page_bytes
            self.page_bytes += max(size, 8) * self.threads
        return ~self.page[register]

    def width(self, operand: Operand, kind_bytes: int) -> int:
        """Bytes of the register that an operand is; of an immediate those of its type."""
        return self.decoder.widths[operand.index] if isinstance(operand, Register) else kind_bytes

    def source(self, operand: Operand, kind: str, ins: Instruction, *, loose: bool = False) -> int:
        """The operand that an instruction reads as type `kind`."""
        return self.number(self.decoder.source(operand, kind, ins, loose=loose))

    def target(self, operand: Operand, kind: str, ins: Instruction, *, loose: bool = False) -> int:
        """The operand that an instruction writes."""
        if isinstance(operand, Sink):
            return self.sink * self.threads
        return self.number(self.decoder.destination(operand, kind, ins, loose=loose))

    def predicate(self, operand: Operand, ins: Instruction) -> tuple[int, int]:
        """(operand, 1 if it is negated) of a predicate."""
        register = operand.register if isinstance(operand, Not) else operand
        return self.source(register, "pred", ins), int(isinstance(operand, Not))

    def address(self, operand: Operand, ins: Instruction) -> tuple[int, int, int, int]:
        """(operand, bytes of its register, low and high half of the offset) of an address."""
        base, offset, width = self.decoder.address(operand, ins)
        low, high = (signed(offset >> shift & 0xFFFFFFFF) for shift in (0, 32))
        return self.number(base), width, low, high

    def watch(self, register: int) -> int:
        """The number of a watched register among them."""
        return self.marks[register] - MARK + WATCH if register in self.marks else self.watched[register]

    def list_of(self, operands: Sequence[int]) -> int:
        """Where a list of operands begins among the lists."""
        if self.marks:
            self.marked.append(list(operands))
            return LIST + len(self.marked) - 1
        first = len(self.extra)
        self.extra += operands
        return first

    def counter(self, kind: str) -> int:
        """The number of the counter of a kind of tensor-core instruction."""
        if kind not in self.kinds:
            self.kinds.append(kind)
        return len(COUNTERS) + self.kinds.index(kind)

    def constants(self, registers: Sequence[Array]) -> Array:
        """The page of constants, from the first registers of a batch."""
        page = np.zeros(max(self.page_bytes, 8), np.uint8)
        for register, offset in self.page.items():
            value = np.broadcast_to(registers[register][0], self.threads)
            raw = np.ascontiguousarray(value).view(np.uint8)
            page[offset : offset + len(raw)] = raw
        return page


def signed(bits: int) -> int:
    """32 bits as a signed number."""
    return bits - (1 << 32) if bits >> 31 else bits


def simple(e: Encoder, ins: Instruction, name: str, kind: str) -> Operation:
    """An operation whose operands are all of one type."""
    return Operation(name, (e.target(ins.operands[0], kind, ins), *(e.source(o, kind, ins) for o in ins.operands[1:])))
