"""A launch by both engines of the PTX emulator, which must agree in values, counters, findings and errors."""

import copy
from typing import Any

import numpy as np
import ptx_emulator
from ptx_emulator.core.findings import NEAR, SAME
from ptx_emulator.core.launch import ENGINES

APART = (SAME, NEAR, "write-write")  # of two warps' values in one word: how far apart


def built() -> bool:
    """Whether there is a compiled machine to compare with."""
    return ENGINES["native"].built()


def launch(kernel: ptx_emulator.Kernel, **arguments: Any) -> ptx_emulator.Report:
    """Like `ptx_emulator.launch`, by the interpreter; before that by the native engine, on a copy of the memory."""
    if not built():
        return ptx_emulator.launch(kernel, **arguments)
    memory = arguments["memory"]
    other = copy.copy(memory)
    other._resize(len(memory.heap))  # copies the heap
    native, error = attempt(kernel, {**arguments, "memory": other, "engine": "native"})
    report, expected = attempt(kernel, {"engine": "interpreter", **arguments})
    assert type(error) is type(expected), f"native: {error!r}, interpreter: {expected!r}"
    if expected is not None:
        raise expected
    assert report is not None
    assert native is not None
    assert np.array_equal(memory.heap, other.heap), "the engines leave different values"
    assert native.counters == report.counters
    compare(native, report)
    return report


def attempt(
    kernel: ptx_emulator.Kernel, arguments: dict[str, Any]
) -> tuple[ptx_emulator.Report | None, ptx_emulator.EmulationError | None]:
    """A launch's report, or the error that ended it."""
    try:
        return ptx_emulator.launch(kernel, **arguments), None
    except ptx_emulator.EmulationError as error:
        return None, error


def keys(faults: list[ptx_emulator.Fault]) -> set[tuple[str, str, str]]:
    """The kind and the two instructions of each."""
    return {(fault.kind, fault.instruction, fault.other) for fault in faults}


def compare(native: ptx_emulator.Report, report: ptx_emulator.Report) -> None:
    """The native engine's report has the findings and the notes of the interpreter's.

    Where CTAs touch the same addresses the interpreter looks at each word once, and tells how far apart the values of
    two warps are in the CTA where they are farthest. The native engine looks at each CTA. So of a pair of instructions
    it may note more, but nothing worse, and not in a launch of one CTA.
    """
    assert keys(native.faults) == keys(report.faults)
    mine, theirs = keys(native.notes), keys(report.notes)
    assert theirs <= mine, f"not noted by the native engine: {theirs - mine}"
    for kind, one, other in mine - theirs:
        worse = APART[APART.index(kind) + 1 :] if kind in APART and native.ctas > 1 else ()
        told = keys(report.faults) | theirs
        assert any((far, one, other) in told for far in worse), (
            f"only by the native engine: {kind}, {one} after {other}"
        )
