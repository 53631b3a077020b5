"""What a PTX file is made of: types, operands, instructions, parameters, kernels."""

from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Instruction:
    """One instruction."""

    text: str  #: as written
    root: str  #: the opcode up to its first dot
    modifiers: tuple[str, ...]  #: what follows the root, in order
    operands: tuple[Operand, ...]  #: in order
    guard: Register | None  #: the predicate `@p`, if there is one
    guard_negated: bool  #: whether it is `@!p`
    source: tuple[int, int] = (0, 0)  #: number of the source file, and line, from `.loc`; zeros where PTX has none


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter at byte `offset` of the parameter space."""

    name: str  #: its name
    type: str  #: such as `u64`
    size: int  #: bytes
    align: int  #: bytes
    offset: int  #: byte in the parameter space
    is_array: bool = False  #: `name[n]`: a struct or a tensor map


@dataclass
class Constants:
    """The `.const` bank of a module."""

    data: bytearray = field(default_factory=bytearray)  #: initial bytes
    symbols: dict[str, int] = field(default_factory=dict)  #: byte offset of each variable


@dataclass
class Kernel:
    """One `.entry`, ready to be decoded."""

    name: str  #: of the entry
    parameter_list: list[Parameter] = field(default_factory=list)  #: in order
    registers: list[tuple[str, str]] = field(default_factory=list)  #: (name, type) of each
    instructions: list[Instruction] = field(default_factory=list)  #: in order
    labels: dict[str, int] = field(default_factory=dict)  #: label -> number of the instruction that follows
    shared_symbols: dict[str, int] = field(default_factory=dict)  #: name -> byte offset in static shared memory
    dynamic_symbols: set[str] = field(default_factory=set)  #: names of the start of dynamic shared memory
    local_symbols: dict[str, int] = field(default_factory=dict)  #: name -> byte offset in a thread's local memory
    shared_bytes: int = 0  #: static
    local_bytes: int = 0  #: of a thread
    required_threads: int | None = None  #: of a CTA, by `.reqntid`
    max_threads: int | None = None  #: of a CTA, by `.maxntid`
    min_ctas: int | None = None  #: CTAs an SM that `.minnctapersm` asks for
    max_registers: int | None = None  #: registers a thread, from `.maxnreg`
    cluster: tuple[int, int, int] | None = None  #: from `.reqnctapercluster`
    constants: Constants = field(default_factory=Constants)  #: of the module
    files: dict[int, str] = field(default_factory=dict)  #: number of a source file -> its name

    @property
    def parameters(self) -> list[tuple[str, str, int, int]]:
        """(name, type, size in bytes, alignment in bytes) of each parameter, in order."""
        return [(p.name, p.type, p.size, p.align) for p in self.parameter_list]

    def where(self, number: int) -> str:
        """The source line of an instruction as "file:line", "" where PTX names none."""
        if not 0 <= number < len(self.instructions):
            return ""
        file, line = self.instructions[number].source
        return f"{self.files.get(file, f'file {file}')}:{line}" if line else ""


@dataclass
class Module:
    """A parsed PTX file."""

    target: str  #: such as `sm_90`
    kernels: dict[str, Kernel]  #: by name
    constants: Constants = field(default_factory=Constants)  #: the `.const` bank
    files: dict[int, str] = field(default_factory=dict)  #: number of a source file -> its name
