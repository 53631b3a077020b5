"""The instructions of a kernel, and what those have in common that differ in nothing but their registers: a form.

Of 72,000 instructions in the kernels of B-CAST, 4,300 have a form that none before has. What depends on the form alone
is found out once for it. An instruction is an object from when somebody asks for it.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from ptx_emulator.core.grammar import Grammar
from ptx_emulator.core.syntax import (
    TYPE_BYTES,
    Address,
    Instruction,
    Not,
    Operand,
    Pair,
    Register,
    Tile,
    Vector,
    parts_of,
)

_MARKS = {kind: chr(0xE000 + number) for number, kind in enumerate(TYPE_BYTES)}
_MARK = re.compile(f"[{''.join(_MARKS.values())}]")
_Maker = Callable[[Sequence[Register]], Operand]


def mark(kind: str) -> str:
    """The character that stands for a register of a type in the text of a form."""
    return _MARKS[kind]


def marks_in(text: str) -> int:
    """How many registers a marked text has."""
    return len(_MARK.findall(text))


def with_names(text: str, names: Sequence[str]) -> str:
    """A marked text with the names of its registers, in order; more names may follow."""
    left = iter(names)
    return _MARK.sub(lambda _: next(left), text)


@dataclass(eq=False)
class Form:
    """What instructions have in common that differ in nothing but their registers. Each form is one object."""

    example: Instruction  #: one of them; its registers are numbered from 0 in the order in which they are written
    marked: str  #: the text, with a mark for each register
    makers: tuple[_Maker, ...]  #: of the operands, from the registers
    access: tuple[tuple[int, ...], tuple[int, ...]] | None = None  #: which registers are read, and written

    def __post_init__(self) -> None:
        self.root: str = self.example.root  #: the opcode up to its first dot
        self.count: int = len(self.example.registers)  #: how many registers are written in it

    def instruction(self, names: Sequence[str], numbers: tuple[int, ...], source: tuple[int, int]) -> Instruction:
        """The instruction with these registers."""
        registers = [Register(number) for number in numbers]
        operands = tuple([make(registers) for make in self.makers])
        guard = registers[0] if self.example.guard is not None else None
        text = with_names(self.marked, names)
        _, root, modifiers, _, _, negated, _, _ = self.example
        return Instruction(text, root, modifiers, operands, guard, negated, source, numbers)


_FORMS: dict[str, Form] = {}
_MOST = 100_000  # forms that are kept, about 200 MB; then all are dropped


def form_of(text: str) -> Form:
    """The form of a marked text, which must mean the same in every kernel: no name of a register, no inner label.

    Raises ParseError or Unsupported.
    """
    form = _FORMS.get(text)
    if form is None:
        if len(_FORMS) >= _MOST:
            _FORMS.clear()
        names = {f"%{number}": Register(number) for number in range(marks_in(text))}
        example = Grammar(names).read(with_names(text, list(names)))
        form = _FORMS[text] = Form(example, text, tuple(_maker(operand) for operand in example.operands))
    return form


def _maker(operand: Operand) -> _Maker:
    """What makes an operand like that of an example, from the registers of an instruction."""
    if not any(isinstance(part, Register) for part in parts_of(operand)):
        return lambda registers: operand
    match operand:
        case Register(place):
            return lambda registers: registers[place]
        case Address(Register(place), offset):
            return lambda registers: Address(registers[place], offset)
        case Not(Register(place)):
            return lambda registers: Not(registers[place])
        case Vector(items):
            makers = [_maker(item) for item in items]
            return lambda registers: Vector(tuple([make(registers) for make in makers]))
        case Pair(first, second):
            one, other = _maker(first), _maker(second)
            return lambda registers: Pair(one(registers), other(registers))
        case Tile(start, coordinates):
            map_, rest = _maker(start), [_maker(item) for item in coordinates]
            return lambda registers: Tile(map_(registers), tuple([make(registers) for make in rest]))
    raise AssertionError(f"an operand of no kind that is known: {operand}")


class Named:
    """The registers of names, by their numbers."""

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self.numbers: Mapping[str, int] = numbers

    def get(self, name: str) -> Register | None:
        """The register of a name, None for what names none."""
        number = self.numbers.get(name)
        return None if number is None else Register(number)


class Numbering(Named):
    """Names to the places of their registers among those of an instruction, where it has them."""

    def __init__(self, numbers: Mapping[str, int], registers: Sequence[int]) -> None:
        super().__init__(numbers)
        self.place: dict[int, int] = {register: place for place, register in reversed(list(enumerate(registers)))}

    def get(self, name: str) -> Register | None:
        """The place as the number of a register."""
        found = super().get(name)
        return None if found is None else Register(self.place[found.index])


class Code(Sequence[Instruction]):
    """Instructions in order. names: (name, type) of each register."""

    def __init__(self, names: Sequence[tuple[str, str]]) -> None:
        self.names: Sequence[tuple[str, str]] = names
        self.forms: list[Form] = []
        self.numbers: list[int] = []  # of the registers, of one instruction after the other
        self.starts: list[int] = [0]  # where those of each begin, and the end
        self.sources: list[tuple[int, int]] = []
        self._made: dict[int, Instruction] = {}

    def add(self, form: Form, numbers: Sequence[int], source: tuple[int, int]) -> None:
        """One more instruction."""
        self.forms.append(form)
        self.numbers.extend(numbers)
        self.starts.append(len(self.numbers))
        self.sources.append(source)

    def name(self, numbers: list[int]) -> None:
        """The registers of all instructions, whose forms and sources are there."""
        self.numbers = numbers
        self.starts = [0, *itertools.accumulate(form.count for form in self.forms)]

    def keep(self, ins: Instruction, example: Instruction) -> None:
        """One more instruction, of a form that no other shares; example: that of its form."""
        self._made[len(self)] = ins
        self.add(Form(example, "", ()), ins.registers, ins.source)

    def registers(self, place: int) -> list[int]:
        """The registers of an instruction, in the order in which they are written."""
        return self.numbers[self.starts[place] : self.starts[place + 1]]

    def of(self, *roots: str) -> list[int]:
        """The places of the instructions with one of these opcodes."""
        return [place for place, form in enumerate(self.forms) if form.root in roots]

    def __len__(self) -> int:
        return len(self.forms)

    @overload
    def __getitem__(self, place: int) -> Instruction: ...
    @overload
    def __getitem__(self, place: slice) -> list[Instruction]: ...
    def __getitem__(self, place: int | slice) -> Instruction | list[Instruction]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        found = self._made.get(place)
        if found is None:
            numbers = tuple(self.numbers[self.starts[place] : self.starts[place + 1]])
            names = [self.names[number][0] for number in numbers]
            found = self._made[place] = self.forms[place].instruction(names, numbers, self.sources[place])
        return found
