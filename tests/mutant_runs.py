"""Runs of a recorded launch that are watched, or that have a trap in their way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

from ptx_emulator import Trap, cuda
from ptx_emulator.mutants import Subject


class Same:
    """A subject as the key of what is known of it: itself alone is equal to it."""

    def __init__(self, subject: Subject) -> None:
        self.it: Subject = subject

    def __hash__(self) -> int:
        return id(self.it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.it is self.it


def watched(subject: Subject, ptx: str, arguments: Any, where: Any, name: str, told: Callable[..., Any]) -> list[Any]:
    """What `told` says of each call of a function of the emulator in a launch, in order."""
    calls, real = [], getattr(where, name)

    def watching(*given: Any, **named: Any) -> Any:
        made = real(*given, **named)
        calls.append(told(made, *given))
        return made

    buffers = {name: array.copy() for name, array in subject.record.buffers.items()}
    landing, seed = subject.runs[0]
    with patch.object(where, name, watching):
        cuda.run(replace(subject.record, ptx=ptx, arguments=arguments, buffers=buffers), landing=landing, seed=seed)
    return calls


@cache
def _run_ends(subject: Same, at: int, code: str) -> bool:
    record = subject.it.record
    ptx = record.ptx[:at] + code + record.ptx[at:]
    buffers = {name: array.copy() for name, array in record.buffers.items()}
    landing, seed = subject.it.runs[0]
    try:
        cuda.run(replace(record, ptx=ptx, buffers=buffers), checks=False, landing=landing, seed=seed)
    except Trap:
        return False
    return True


def runs_with(subject: Subject, at: int, code: str) -> bool:
    """Whether the launch runs to its end with this code in front of an instruction; each is asked once."""
    return _run_ends(Same(subject), at, code)
