"""What an instruction is made of: types, operands."""

from dataclasses import dataclass
from typing import NamedTuple

TYPE_BYTES = {
    "pred": 1,
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "f16": 2,
    "bf16": 2,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "f32": 4,
    "f64": 8,
}


@dataclass(frozen=True)
class Register:
    """A register by its number in `Kernel.registers`."""

    index: int


@dataclass(frozen=True)
class Special:
    """A predefined register such as `%tid.x`, without the percent sign."""

    name: str


#: Nanoseconds of the whole GPU.
TIMER = Special("globaltimer")


@dataclass(frozen=True)
class Literal:
    """An immediate, as written."""

    text: str


@dataclass(frozen=True)
class Symbol:
    """The name of a variable or a parameter."""

    name: str


@dataclass(frozen=True)
class Sink:
    """`_`: the value is dropped."""


@dataclass(frozen=True)
class Not:
    """`!%p`."""

    register: Register


@dataclass(frozen=True)
class Pair:
    """`d|p`: two destinations."""

    first: "Operand"
    second: "Operand"


@dataclass(frozen=True)
class Vector:
    """`{a, b, c, d}`."""

    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; offset in bytes."""

    base: "Operand"
    offset: int


@dataclass(frozen=True)
class Tile:
    """`[map, {x, y}]`: the tensor map's address, and coordinates, innermost first."""

    map: "Operand"
    coordinates: tuple["Operand", ...]


Operand = Register | Special | Literal | Symbol | Sink | Not | Pair | Vector | Address | Tile


def parts_of(operand: Operand) -> "tuple[Operand, ...]":
    """The operands inside of one that is made of others, to the last; of any other itself."""
    match operand:
        case Not(inner) | Address(inner, _):
            return parts_of(inner)
        case Pair(first, second):
            return parts_of(first) + parts_of(second)
        case Vector(items):
            return tuple(part for item in items for part in parts_of(item))
        case Tile(start, coordinates):
            return parts_of(start) + tuple(part for item in coordinates for part in parts_of(item))
    return (operand,)


def registers_in(operand: Operand) -> frozenset[int]:
    """The numbers of the registers in an operand."""
    if isinstance(operand, Register):
        return frozenset((operand.index,))
    if isinstance(operand, Literal):
        return frozenset()
    return frozenset(part.index for part in parts_of(operand) if isinstance(part, Register))


class Instruction(NamedTuple):
    """One instruction."""

    text: str  #: as written
    root: str  #: the opcode up to its first dot
    modifiers: tuple[str, ...]  #: what follows the root, in order
    operands: tuple[Operand, ...]  #: in order
    guard: Register | None  #: the predicate `@p`, if there is one
    guard_negated: bool  #: whether it is `@!p`
    source: tuple[int, int]  #: number of the source file, and line, from `.loc`; zeros where PTX has none
    registers: tuple[int, ...]  #: numbers of the registers, in the order in which they are written
