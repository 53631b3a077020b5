"""The text of one instruction to its opcode and operands."""

import re
from collections.abc import Callable
from typing import Protocol

from ptx_emulator.core.errors import ParseError, Unsupported
from ptx_emulator.core.syntax import (
    Address,
    Instruction,
    Literal,
    Not,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Tile,
    Vector,
    parts_of,
)

_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\s*(?:0x[0-9a-fA-F]+|\d+))|(-\s*\d+))?\s*\]$")
_TILE = re.compile(r"\[\s*([%\w$]+)\s*,\s*\{([^}]*)\}\s*\]$")
_BRACKETS = set("{[()]}")
_INSTRUCTION = re.compile(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)


class Names(Protocol):
    """The registers that a text may name."""

    def get(self, name: str, /) -> Register | None:
        """The register of this name, None for what names none."""


class Grammar:
    """Reads instructions. label: the whole name of one."""

    def __init__(self, registers: Names, label: Callable[[str], str] = str) -> None:
        self.registers: Names = registers
        self.label: Callable[[str], str] = label

    def read(self, statement: str, source: tuple[int, int] = (0, 0)) -> Instruction:
        """One instruction. Raises ParseError or Unsupported."""
        match = _INSTRUCTION.match(statement)
        if match is None:
            raise ParseError(f"unreadable instruction: {statement!r}")
        negated, guard_name, opcode, rest = match.groups()
        guard = self.registers.get(guard_name) if guard_name else None
        if guard_name and guard is None:
            raise ParseError(f"undeclared guard: {statement!r}")
        root, *modifiers = opcode.split(".")
        operands = tuple(self._operand(part, statement) for part in _split(rest))
        named = ((guard,) if guard else ()) + tuple(part for operand in operands for part in parts_of(operand))
        numbers = tuple(part.index for part in named if isinstance(part, Register))
        return Instruction(statement, root, tuple(modifiers), operands, guard, bool(negated), source, numbers)

    def _operand(self, text: str, statement: str) -> Operand:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(part, statement) for part in _split(text[1:-1])))
        if text.startswith("["):
            tile = _TILE.match(text)
            if tile is not None:
                coordinates = tuple(self._operand(part, statement) for part in _split(tile.group(2)))
                return Tile(self._operand(tile.group(1), statement), coordinates)
            match = _ADDRESS.match(text)
            if match is None:
                raise Unsupported(f"unsupported address {text} in: {statement}")
            offset = (match.group(2) or match.group(3) or "0").replace(" ", "")
            return Address(self._operand(match.group(1), statement), int(offset, 0))
        if "|" in text:
            first, second = (part.strip() for part in text.split("|"))
            return Pair(self._operand(first, statement), self._operand(second, statement))
        if text.startswith("!"):
            register = self.registers.get(text[1:].strip())
            if register is None:
                raise ParseError(f"undeclared register {text} in: {statement}")
            return Not(register)
        register = self.registers.get(text)
        if register is not None:
            return register
        if text.startswith("%"):
            return Special(text[1:])
        if re.match(r"-?\s*\d", text):
            return Literal(text.replace(" ", ""))
        return Symbol(self.label(text))


def _split(text: str) -> list[str]:
    """Split at the commas outside braces and brackets."""
    if not _BRACKETS & set(text):
        parts = [part.strip() for part in text.split(",")]
        return parts if parts[-1] else parts[:-1]
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
