"""A launch by both engines of the PTX emulator, which must agree in values, counters, findings and errors."""

import copy
from typing import Any

import numpy as np
import ptx_emulator
from ptx_emulator.native.library import NotBuilt, library


def built() -> bool:
    """Whether there is a compiled machine to compare with."""
    try:
        library()
    except NotBuilt:
        return False
    return True


def launch(kernel: ptx_emulator.Kernel, **arguments: Any) -> ptx_emulator.Report:
    """Like `ptx_emulator.launch`, by the interpreter; before that by the native engine, on a copy of the memory."""
    if not built():
        return ptx_emulator.launch(kernel, **arguments)
    memory = arguments["memory"]
    other = copy.copy(memory)
    other._resize(len(memory.heap))  # copies the heap
    native, error = attempt(kernel, {**arguments, "memory": other, "engine": "native"})
    report, expected = attempt(kernel, arguments)
    assert type(error) is type(expected), f"native: {error!r}, interpreter: {expected!r}"
    if expected is not None:
        raise expected
    assert report is not None
    assert native is not None
    assert np.array_equal(memory.heap, other.heap), "the engines leave different values"
    assert native.counters == report.counters
    assert keys(native) == keys(report)
    return report


def attempt(
    kernel: ptx_emulator.Kernel, arguments: dict[str, Any]
) -> tuple[ptx_emulator.Report | None, ptx_emulator.EmulationError | None]:
    """A launch's report, or the error that ended it."""
    try:
        return ptx_emulator.launch(kernel, **arguments), None
    except ptx_emulator.EmulationError as error:
        return None, error


def keys(report: ptx_emulator.Report) -> set[tuple[str, str, str]]:
    """The kind and the two instructions of each finding, and of each note about a pair that no finding names.

    Of CTAs that touch the same addresses the interpreter tells the worst; the native engine looks at each.
    """
    found = {(fault.kind, fault.instruction, fault.other) for fault in report.faults}
    pairs = {(one, other) for _, one, other in found}
    return found | {(n.kind, n.instruction, n.other) for n in report.notes if (n.instruction, n.other) not in pairs}
