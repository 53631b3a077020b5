"""From instructions to closures: each instruction is decoded once, into a function of the machine and a lane mask.

A register holds an unsigned NumPy array of its width, or bool for a predicate, of shape (CTAs or 1, threads or 1): a
value
that is the same for every CTA, or for every thread of a CTA, is kept and computed once. Arrays are never changed in
place, so an array's identity says that its value is unchanged.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_emulator.core.errors import Unsupported
from ptx_emulator.core.syntax import (
    TYPE_BYTES,
    Address,
    Instruction,
    Kernel,
    Literal,
    Not,
    Operand,
    Register,
    Special,
    Symbol,
    Vector,
)

if TYPE_CHECKING:
    from ptx_emulator.core.execute import Machine

Array = np.ndarray[Any, Any]
Action = Callable[["Machine", Array | None], None]
Builder = Callable[["Decoder", Instruction], Action | None]

UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT: dict[int, Any] = {2: np.float16, 4: np.float32, 8: np.float64}

SHARED_BASE = 1024  # shared addresses below stay unmapped, so that a null shared pointer faults
RANK_SHIFT = 24  # mapa: (rank + 1) << RANK_SHIFT | address in the CTA's own memory
SHARED_WINDOW = 0x7F00_0000_0000  # where cvta.shared puts shared memory in the generic space
LOCAL_WINDOW = 0x7E00_0000_0000
PARAM_WINDOW = 0x7D00_0000_0000  # where cvta.param puts the kernel's parameters
CONST_WINDOW = 0x7C00_0000_0000
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW, "const": CONST_WINDOW}
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
BUILDERS: dict[str, list[Builder]] = {}
WaitBuilder = Callable[["Decoder", Instruction], "Wait | None"]
WAITS: dict[str, list[WaitBuilder]] = {}


@dataclass
class Wait:
    """The end of a block at which lanes may sleep; `at` is the instruction's number."""

    at: int
    text: str
    guard: int | None = field(default=None, init=False)
    negated: bool = field(default=False, init=False)

    def together(self, m: "Machine", live: Array | None) -> bool:
        """All live lanes of the batch have come: pass it at once and return True where that is simpler than `enter`."""
        return False

    def enter(self, m: "Machine", lanes: Array) -> Array:
        """The lanes, (CTAs, threads), have come; returns those that sleep, until someone calls `Machine.wake`."""
        raise NotImplementedError

    def tell(self, m: "Machine", lanes: Array) -> str:
        """For a report of a deadlock: what the sleeping lanes wait for."""
        raise NotImplementedError


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
        self.text = ins.text
        self.left = list(ins.modifiers)

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


def round_up(value: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-value // unit) * unit


@dataclass
class Decoder:
    """Turns the operands of one kernel into numbers of registers; immediates and special registers get numbers too."""

    kernel: Kernel
    constants: dict[int, Array] = field(default_factory=dict)
    specials: dict[int, str] = field(default_factory=dict)
    current: int = 0  # number of the instruction being decoded
    _numbers: dict[object, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.count = len(self.kernel.registers)
        self.dynamic_offset = round_up(self.kernel.shared_bytes, 1024)
        self.widths = [TYPE_BYTES[kind] for _, kind in self.kernel.registers]
        self.predicate = [kind == "pred" for _, kind in self.kernel.registers]

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


def literal_bits(text: str, kind: str) -> int:
    """The bit pattern of an immediate as an operand of type `kind`."""
    floating = kind in ("f16", "f32", "f64", "bf16", "tf32")
    if text[:2] in ("0f", "0F"):
        bits = int(text[2:], 16)
        return (
            bits
            if kind != "f64"
            else int.from_bytes(struct.pack("<d", struct.unpack("<f", struct.pack("<I", bits))[0]), "little")
        )
    if text[:2] in ("0d", "0D"):
        bits = int(text[2:], 16)
        return (
            bits
            if TYPE_BYTES[kind] == 8
            else int.from_bytes(struct.pack("<f", struct.unpack("<d", struct.pack("<Q", bits))[0]), "little")
        )
    text = text.rstrip("U")
    if floating and ("." in text or "e" in text.lower()) and not text.lower().startswith("0x"):
        if kind == "f64":
            return int.from_bytes(struct.pack("<d", float(text)), "little")
        if kind in ("f32", "tf32"):
            return int.from_bytes(struct.pack("<f", float(text)), "little")
        if kind == "f16":
            return int.from_bytes(struct.pack("<e", float(text)), "little")
        return int.from_bytes(struct.pack("<f", float(text)), "little") >> 16
    return int(text, 8) if len(text) > 1 and text[0] == "0" and text.isdigit() else int(text, 0)


def choose(mask: Array, a: Array, b: Array) -> Array:
    """`a` where the mask holds, else `b`."""
    return np.where(mask, a, b)


def assign(out: int, function: Callable[..., Array], *sources: int) -> Action:
    """The action `out = function(sources)` on the lanes of the mask."""
    if len(sources) == 1:
        (a,) = sources

        def one(m: "Machine", mask: Array | None) -> None:
            r = m.r
            value = function(r[a])
            r[out] = value if mask is None else np.where(mask, value, r[out])

        return one
    if len(sources) == 2:
        a, b = sources

        def two(m: "Machine", mask: Array | None) -> None:
            r = m.r
            value = function(r[a], r[b])
            r[out] = value if mask is None else np.where(mask, value, r[out])

        return two

    def many(m: "Machine", mask: Array | None) -> None:
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
    """The action of one instruction without its guard. Raises Unsupported when no builder knows it."""
    for builder in BUILDERS.get(ins.root, []):
        action = builder(decoder, ins)
        if action is not None:
            return action
    raise Unsupported(f"unsupported: {ins.text}")
