"""The operations of a form of instruction, with gaps for its registers: encoded once, filled in for each instruction.

The example of a form is encoded with marks in place of its registers' operands. Where a mark comes out, an operand of
that register belongs. So a pattern holds for a form because encoders look at the types of registers, and pass their
operands on as they are.
"""

from typing import NamedTuple

import numpy as np

from ptx_emulator.core.code import Code, Form
from ptx_emulator.core.syntax import Instruction, registers_in
from ptx_emulator.native.encode import LIST, MARK, WATCH, Encoder
from ptx_emulator.native.integers import unpacked
from ptx_emulator.native.wgmma import around

#: (place among the words or in the list, which of the instruction's registers, 1 for its number among the watched)
Gaps = tuple[tuple[int, int, int], ...]


class Row(NamedTuple):
    """One operation. Its words lack the number of the instruction and its step."""

    words: list[int]
    steps: bool
    gaps: Gaps = ()
    lists: tuple[tuple[int, list[int], Gaps], ...] = ()  # (place among the words, operands, gaps)


Pattern = tuple[Row, ...]  # none where the interpreter is to execute the instruction


class Patterns:
    """The patterns of one kernel's instructions."""

    def __init__(self, encoder: Encoder, code: Code) -> None:
        self.encoder: Encoder = encoder
        self.code: Code = code
        self.watched: frozenset[int] = frozenset(encoder.watched)
        watched = np.isin(np.array(code.numbers, np.int64), sorted(self.watched))
        before = np.append(0, np.cumsum(watched))[np.array(code.starts)]  # the instructions in front of each
        self._watches: list[int] = np.diff(before).tolist()  # how many watched registers each instruction has
        self._known: dict[tuple[Form, tuple[bool, ...]], Pattern] = {}

    def of(self, number: int) -> Pattern:
        """The pattern of an instruction, the same object for all of its form where they share it."""
        form = self.code.forms[number]
        watches: tuple[bool, ...] = ()  # which of its registers are watched, where any is
        if self._watches[number]:
            watches = tuple([register in self.watched for register in self.code.registers(number)])
        pattern = self._known.get((form, watches))
        return self._new(form, self.code[number], watches) if pattern is None else pattern

    def _new(self, form: Form, ins: Instruction, watches: tuple[bool, ...]) -> Pattern:
        if len(set(ins.registers)) < len(ins.registers) or form.root == "wgmma":
            return self._encoded(ins)  # one register could take two marks; accumulators are known by their numbers
        e = self.encoder
        e.marks = {register: MARK + place for place, register in enumerate(ins.registers)}
        pattern = tuple(_with_gaps(row, e.marked) for row in self._encoded(ins))
        self._known[form, watches] = pattern
        e.marks, e.marked = {}, []
        return pattern

    def _encoded(self, ins: Instruction) -> Pattern:
        e = self.encoder
        if not e.alone and ins.root == "mov" and not self.watched.isdisjoint(registers_in(ins.operands[0])):
            return ()  # the interpreter asks by the identity of arrays what a move has handed on
        one = e.operation(ins)
        operations = around(e, ins, unpacked(e, ins) if one is None else [one])
        return tuple(Row(e.words(operation, ins), operation.steps) for operation in operations)


def _with_gaps(row: Row, lists: list[list[int]]) -> Row:
    """An operation of a marked instruction, and the lists that were made for it."""
    made = ((place, lists[word - LIST]) for place, word in enumerate(row.words) if LIST <= word < WATCH)
    found = tuple((place, operands, _gaps(operands)) for place, operands in made)
    return Row([word if word < MARK else 0 for word in row.words], row.steps, _gaps(row.words), found)


def _gaps(words: list[int]) -> Gaps:
    marks = ((place, word, int(word >= WATCH)) for place, word in enumerate(words) if word >= MARK)
    return tuple((place, word - (MARK, WATCH)[kind], kind) for place, word, kind in marks if kind or word < LIST)
