"""What a PTX file is made of: kernels, their parameters, constants."""

from dataclasses import dataclass, field

from ptx_emulator.core.code import Code


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
    instructions: Code = field(init=False)  #: in order
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

    def __post_init__(self) -> None:
        self.instructions = Code(self.registers)

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
