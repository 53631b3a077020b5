"""Instructions in the text of PTX: where each begins and ends, and the same text with one of them replaced.

The text itself is edited, not what the parser makes of it, so that an assembler can read every mutant as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_ROOTS = (
    r"bar|barrier|fence|membar|mbarrier|mapa|setmaxnreg|tensormap\.replace|wgmma|st\.async|red\.async"
    r"|cp\.async\.(?:wait|commit|mbarrier|bulk)|cp\.reduce\.async\.bulk"
)
_INSTRUCTION = re.compile(rf"(?<![\w.$%])(?:@(!?)\s*([%\w$]+)\s+)?((?:{_ROOTS})[\w.:]*)\s*([^;]*);")
_COMMENT = re.compile(r"//[^\n]*")


@dataclass(frozen=True)
class Found:
    """One instruction in a text."""

    start: int  #: of its guard, a position in the text
    stop: int  #: behind its semicolon
    negated: bool  #: whether its guard is `@!p`
    guard: str  #: the guard's predicate, "" where there is none
    opcode: str  #: with its modifiers
    operands: tuple[str, ...]  #: as written

    def with_operand(self, index: int, operand: str) -> str:
        """The instruction with another operand."""
        changed = (*self.operands[:index], operand, *self.operands[index + 1 :])
        return self.written(self.opcode, changed)

    def written(self, opcode: str, operands: Sequence[str]) -> str:
        """An instruction under the same guard."""
        return f"{self.when}{opcode} {', '.join(operands)};"

    @property
    def when(self) -> str:
        """The guard as written, with a space behind it."""
        return f"@{'!' * self.negated}{self.guard} " if self.guard else ""


def instructions(text: str) -> Iterator[Found]:
    """What synchronises, copies in bulk, multiplies asynchronously or changes a tensor map, in order."""
    plain = _COMMENT.sub(lambda match: " " * len(match[0]), text)
    for match in _INSTRUCTION.finditer(plain):
        negated, guard, opcode, operands = match.groups()
        yield Found(match.start(), match.end(), bool(negated), guard or "", opcode, split(operands))


def split(operands: str) -> tuple[str, ...]:
    """Operands at their commas, but for commas inside of brackets and braces."""
    depth, parts = 0, [""]
    for letter in operands:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts if part.strip())


def replaced(text: str, found: Found, by: str) -> str:
    """The text with other statements in place of an instruction."""
    return text[: found.start] + by + text[found.stop :]


def line_of(text: str, found: Found) -> int:
    """The line, from 1, that an instruction begins in."""
    return text.count("\n", 0, found.start) + 1
