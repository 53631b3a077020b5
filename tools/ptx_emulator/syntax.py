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


Operand = Register | Special | Literal | Symbol | Sink | Not | Pair | Vector | Address


@dataclass(frozen=True)
class Instruction:
    """One instruction. `root` is the opcode up to its first dot, `modifiers` what follows, in order."""

    text: str  #: as written
    root: str  #: the opcode up to its first dot
    modifiers: tuple[str, ...]  #: what follows the root, in order
    operands: tuple[Operand, ...]  #: in order
    guard: Register | None  #: the predicate `@p`, if there is one
    guard_negated: bool  #: whether it is `@!p`


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter at byte `offset` of the parameter space."""

    name: str  #: its name
    type: str  #: such as `u64`
    size: int  #: bytes
    align: int  #: bytes
    offset: int  #: byte in the parameter space


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

    @property
    def parameters(self) -> list[tuple[str, str, int, int]]:
        """(name, type, size in bytes, alignment in bytes) of each parameter, in order."""
        return [(p.name, p.type, p.size, p.align) for p in self.parameter_list]


@dataclass
class Module:
    """A parsed PTX file."""

    target: str  #: such as `sm_90`
    kernels: dict[str, Kernel]  #: by name
