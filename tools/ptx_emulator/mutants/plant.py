"""Every single fault of a recorded launch: in its PTX, instruction by instruction, and in its tensor maps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ptx_emulator.cuda import Given, Pointer, Record, Struct, Tiled
from ptx_emulator.mutants.changes import changes
from ptx_emulator.mutants.text import instructions, line_of, replaced

SWIZZLES = (0, 32, 64, 128)


@dataclass(frozen=True)
class Mutant:
    """A launch with one fault."""

    family: str  #: what kind of thing is wrong
    line: int  #: of the PTX, from 1; of a tensor map the parameter's number, from 0
    instruction: str  #: as it was, or which tensor map
    change: str  #: how it is wrong
    record: Record = field(repr=False)  #: the wrong launch; its buffers are those of the right one
    at: int = -1  #: where the instruction begins in the launch's own PTX; -1: it is no instruction
    probe: str = field(default="", repr=False)  #: PTX that traps if the change made an operand another; "": no such PTX
    reach: str = field(default="", repr=False)  #: PTX that traps if the instruction is reached; "": there is none


def mutants(record: Record) -> list[Mutant]:
    """All mutants of a launch, in the order of the PTX, those of tensor maps last."""
    return [*_in_ptx(record), *_in_maps(record)]


def _in_ptx(record: Record) -> Iterator[Mutant]:
    text = record.ptx
    for found in instructions(text):
        line = line_of(text, found)
        name = " ".join(text[found.start : found.stop].split())
        name = re.sub(r"\{[^{}]{40,}\}", "{...}", name)  # a product's accumulators
        reach = text[: found.start] + f"{found.when}trap; " + text[found.start :]
        for change in changes(found):
            wrong = replace(record, ptx=replaced(text, found, change.instead))
            probe = replaced(text, found, change.probe) if change.probe else ""
            yield Mutant(change.family, line, name, change.words, wrong, found.start, probe, reach)


def _in_maps(record: Record) -> Iterator[Mutant]:
    for number, given in enumerate(record.arguments):
        inside = given.inside if isinstance(given, Struct) else {}
        for at, tile in inside.items() if inside else [(-1, given)]:
            if not isinstance(tile, Tiled):
                continue
            for words, other in _other_maps(tile):
                changed: Given = replace(given, inside={**inside, at: other}) if isinstance(given, Struct) else other
                arguments = (*record.arguments[:number], changed, *record.arguments[number + 1 :])
                name = f"tensor map of {tile.start.buffer}{f', byte {at}' * (at >= 0)}"
                yield Mutant("tensor map", number, name, words, replace(record, arguments=arguments))


def _other_maps(tile: Tiled) -> Iterator[tuple[str, Tiled]]:
    """(how it is wrong, the map), a field at a time."""
    for width in SWIZZLES:
        if width != tile.swizzle:
            yield f"swizzle {width}", replace(tile, swizzle=width)
    for name, edits in (
        ("box", {"x 2": lambda n: 2 * n, "/ 2": lambda n: n // 2}),
        ("strides", {"+ 16": lambda n: n + 16, "- 16": lambda n: n - 16, "x 2": lambda n: 2 * n}),
        ("sizes", {"+ 1": lambda n: n + 1, "- 1": lambda n: n - 1}),
    ):
        for place, value in enumerate(getattr(tile, name)):
            for words, edit in edits.items():
                numbers = list(getattr(tile, name))
                numbers[place] = edit(value)
                changed: dict[str, Any] = {name: tuple(numbers)}
                yield f"{name}[{place}] {words}", replace(tile, **changed)
    yield "start + 16", replace(tile, start=Pointer(tile.start.buffer, tile.start.offset + 16))
