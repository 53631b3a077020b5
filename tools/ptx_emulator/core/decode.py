"""From instructions to closures: each instruction is decoded once, into a function of the machine and a lane mask.

A register holds an unsigned NumPy array of its width, or bool for a predicate, of shape (CTAs or 1, threads or 1): a
value that is the same for every CTA, or for every thread of a CTA, is kept and computed once. Arrays are never changed
in place, so an array's identity says that its value is unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ptx_emulator.core.errors import Unsupported
from ptx_emulator.core.kernel import Kernel
from ptx_emulator.core.literals import literal_bits, round_up
from ptx_emulator.core.spaces import SHARED_BASE, UNSIGNED, Array
from ptx_emulator.core.state import State, Wait
from ptx_emulator.core.syntax import (
    TYPE_BYTES,
    Address,
    Instruction,
    Literal,
    Not,
    Operand,
    Register,
    Special,
    Symbol,
    Vector,
    registers_in,
)

Action = Callable[[State, Array | None], None]
Builder = Callable[["Decoder", Instruction], Action | None]

SPECIALS = {
    *(
        f"{name}.{axis}"
        for name in ("tid", "ntid", "ctaid", "nctaid", "cluster_ctaid", "cluster_nctaid")
        for axis in "xyz"
    ),
    *(f"{name}.{axis}" for name in ("clusterid", "nclusterid") for axis in "xyz"),
    *("cluster_ctarank", "cluster_nctarank"),
    *("laneid", "warpid", "nwarpid", "dynamic_smem_size", "total_smem_size"),
    *("lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge"),
}
#: Operands of the opcodes that have one form, the target among them. A NumPy function takes another number without a
#: word: the third argument of `np.add` is where it writes.
OPERANDS: dict[str, int] = {
    **dict.fromkeys(("abs", "neg", "not", "cnot", "popc", "clz", "brev", "bfind"), 2),
    **dict.fromkeys(("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"), 2),
    **dict.fromkeys(("add", "sub", "mul", "mul24", "div", "rem", "and", "or", "xor", "shl", "shr", "copysign"), 3),
    **dict.fromkeys(("mad", "mad24", "fma", "selp", "slct", "shf", "bfe", "prmt"), 4),
    "bfi": 5,
}
BUILDERS: dict[str, list[Builder]] = {}
WaitBuilder = Callable[["Decoder", Instruction], Wait | None]
WAITS: dict[str, list[WaitBuilder]] = {}


def instruction(*roots: str) -> Callable[[Builder], Builder]:
    """Register a builder for opcodes. Builders of one opcode are asked in turn; one that returns None declines."""

    def register(builder: Builder) -> Builder:
        for root in roots:
            BUILDERS.setdefault(root, []).append(builder)
        return builder

    return register


def wait(*roots: str) -> Callable[[WaitBuilder], WaitBuilder]:
    """Register a builder of block ends for opcodes, asked in turn like those of `instruction`, and before them."""

    def register(builder: WaitBuilder) -> WaitBuilder:
        for root in roots:
            WAITS.setdefault(root, []).append(builder)
        return builder

    return register


class Modifiers:
    """The modifiers of one instruction; what no builder takes makes the instruction unsupported."""

    def __init__(self, ins: Instruction) -> None:
        self.text: str = ins.text
        self.left: list[str] = list(ins.modifiers)

    def take(self, *names: str) -> str | None:
        """The first of `names` that is present, removed; None when none is."""
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return None

    def drop(self, *names: str) -> None:
        """Remove modifiers that change no value here (caching, ordering, scope, flush to zero)."""
        self.left = [name for name in self.left if name not in names]

    def types(self) -> list[str]:
        """Every type name, in order, removed."""
        found = [name for name in self.left if name in TYPE_BYTES]
        self.left = [name for name in self.left if name not in TYPE_BYTES]
        return found

    def end(self) -> None:
        """Raise Unsupported when something is left."""
        if self.left:
            raise Unsupported(f"unsupported: .{'.'.join(self.left)} of {self.text}")


@dataclass
class Decoder:
    """Turns the operands of one kernel into numbers of registers; immediates and special registers get numbers too."""

    kernel: Kernel
    constants: dict[int, Array] = field(default_factory=dict)
    specials: dict[int, str] = field(default_factory=dict)
    current: int = 0  # number of the instruction being decoded
    _numbers: dict[object, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.count: int = len(self.kernel.registers)
        self.dynamic_offset: int = round_up(self.kernel.shared_bytes, 1024)
        self.widths: list[int] = [TYPE_BYTES[kind] for _, kind in self.kernel.registers]
        self.predicate: list[bool] = [kind == "pred" for _, kind in self.kernel.registers]

    @cached_property
    def watched(self) -> frozenset[int]:
        """The registers of which wgmma asks whether they were written: those that it names, and what is moved there."""
        code = self.kernel.instructions
        found: set[int] = set()
        for number in code.of("wgmma"):
            found.update(*map(registers_in, code[number].operands))
        moves: list[tuple[set[int], int]] = []  # (targets, source)
        for number in code.of("mov") if found else ():
            targets, source = code.forms[number].example.operands
            if isinstance(source, Register):
                registers = code.registers(number)
                moves.append(({registers[place] for place in registers_in(targets)}, registers[source.index]))
        grown = True
        while grown:
            more = {source for targets, source in moves if not targets.isdisjoint(found)}
            grown = not more <= found
            found |= more
        return frozenset(found)

    def _number(self, key: object) -> int:
        if key not in self._numbers:
            self._numbers[key] = self.count
            self.count += 1
        return self._numbers[key]

    def constant(self, bits: int, size: int) -> int:
        """The number of a register that holds `bits` in `size` bytes."""
        number = self._number((bits & ((1 << 8 * size) - 1), size))
        self.constants[number] = np.full((1, 1), bits & ((1 << 8 * size) - 1), UNSIGNED[size])
        return number

    def flag(self, value: bool) -> int:
        """The number of a predicate register that holds `value`."""
        number = self._number(value)
        self.constants[number] = np.full((1, 1), value)
        return number

    def source(self, operand: Operand, kind: str, ins: Instruction, *, loose: bool = False) -> int:
        """The number of the register that holds `operand`, an operand of type `kind`.

        `loose` lets a register be wider or narrower than the type; the caller then converts.
        """
        size = TYPE_BYTES[kind]
        if isinstance(operand, Register):
            if self.predicate[operand.index] != (kind == "pred") or (self.widths[operand.index] != size and not loose):
                raise Unsupported(
                    f"unsupported: a .{kind} operand in a .{self.kernel.registers[operand.index][1]} register: "
                    f"{ins.text}"
                )
            return operand.index
        if isinstance(operand, Literal):
            if kind == "pred":
                return self.flag(int(operand.text, 0) != 0)
            return self.constant(literal_bits(operand.text, kind), size)
        if isinstance(operand, Special):
            if operand.name not in SPECIALS:
                raise Unsupported(f"unsupported: %{operand.name} in {ins.text}")
            number = self._number(("special", operand.name))
            self.specials[number] = operand.name
            return number
        if isinstance(operand, Symbol):
            return self.constant(self.address_of(operand.name, ins), size)
        raise Unsupported(f"unsupported operand in: {ins.text}")

    def address_of(self, name: str, ins: Instruction) -> int:
        """The address of a variable in its own state space."""
        if name in self.kernel.dynamic_symbols:
            return SHARED_BASE + self.dynamic_offset
        if name in self.kernel.shared_symbols:
            return SHARED_BASE + self.kernel.shared_symbols[name]
        if name in self.kernel.local_symbols:
            return self.kernel.local_symbols[name]
        if name in self.kernel.constants.symbols:
            return self.kernel.constants.symbols[name]
        for parameter in self.kernel.parameter_list:
            if parameter.name == name:
                return parameter.offset
        raise Unsupported(f"unsupported: unknown symbol {name} in {ins.text}")

    def destination(self, operand: Operand, kind: str, ins: Instruction, *, loose: bool = False) -> int:
        """The number of the register to write; for `_` the number of a register nobody reads."""
        if isinstance(operand, Register):
            return self.source(operand, kind, ins, loose=loose)
        if type(operand).__name__ != "Sink":
            raise Unsupported(f"unsupported destination in: {ins.text}")
        return self.constant(0xDEAD, 8) if kind != "pred" else self._number("sink predicate")

    def predicate_source(self, operand: Operand, ins: Instruction) -> tuple[int, bool]:
        """(register number, negated) of a predicate operand."""
        if isinstance(operand, Not):
            return self.source(operand.register, "pred", ins), True
        return self.source(operand, "pred", ins), False

    def address(self, operand: Operand, ins: Instruction) -> tuple[int, int, int]:
        """(register number, byte offset, register width) of an address operand."""
        if not isinstance(operand, Address):
            raise Unsupported(f"unsupported address in: {ins.text}")
        base = operand.base
        if isinstance(base, Register):
            return base.index, operand.offset, self.widths[base.index]
        if isinstance(base, Symbol):
            return self.constant(self.address_of(base.name, ins) + operand.offset, 8), 0, 8
        if isinstance(base, Literal):
            return self.constant(int(base.text, 0) + operand.offset, 8), 0, 8
        raise Unsupported(f"unsupported address in: {ins.text}")


def items(operand: Operand) -> tuple[Operand, ...]:
    """The elements of a vector operand, or the operand itself."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def choose(mask: Array, a: Array, b: Array) -> Array:
    """`a` where the mask holds, else `b`."""
    return np.where(mask, a, b)


def assign(out: int, function: Callable[..., Array], *sources: int) -> Action:
    """The action `out = function(sources)` on the lanes of the mask."""
    if len(sources) == 1:
        (a,) = sources

        def one(m: State, mask: Array | None) -> None:
            r = m.r
            value = function(r[a])
            r[out] = value if mask is None else np.where(mask, value, r[out])

        return one
    if len(sources) == 2:
        a, b = sources

        def two(m: State, mask: Array | None) -> None:
            r = m.r
            value = function(r[a], r[b])
            r[out] = value if mask is None else np.where(mask, value, r[out])

        return two

    def many(m: State, mask: Array | None) -> None:
        r = m.r
        value = function(*[r[s] for s in sources])
        r[out] = value if mask is None else np.where(mask, value, r[out])

    return many


def build_wait(decoder: Decoder, ins: Instruction) -> Wait | None:
    """The block end that an instruction is, or None for one that no lane sleeps at."""
    for builder in WAITS.get(ins.root, []):
        end = builder(decoder, ins)
        if end is not None:
            end.guard, end.negated = ins.guard.index if ins.guard else None, ins.guard_negated
            return end
    return None


def build(decoder: Decoder, ins: Instruction) -> Action:
    """The action of one instruction without its guard.

    Raises:
        Unsupported: no builder knows it, or it has another number of operands than PTX gives it.
    """
    wanted = OPERANDS.get(ins.root)
    if wanted is not None and len(ins.operands) != wanted:
        raise Unsupported(f"unsupported: {len(ins.operands)} operands where {ins.root} has {wanted}: {ins.text}")
    for builder in BUILDERS.get(ins.root, []):
        action = builder(decoder, ins)
        if action is not None:
            return action
    raise Unsupported(f"unsupported: {ins.text}")
