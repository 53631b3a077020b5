"""A launch by both engines of the PTX emulator, which must agree in values, counters, findings and errors."""

import copy
from functools import cache
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


@cache
def adds_in_order() -> bool:
    """Whether NumPy's BLAS adds a product's terms in the order of k, as the native engine does; some kernels do not.

    OpenBLAS's for AVX-512 do, those for AVX2 do not (OPENBLAS_CORETYPE=Haswell, 2026-11-30): last bits differ.
    """
    random = np.random.default_rng(0)
    left, right = (random.integers(-128, 128, shape).astype(np.float32) / 7 for shape in ((64, 16), (16, 8)))
    exact = np.zeros((64, 8), np.float64)
    for k in range(16):
        exact = (exact + left[:, k, None].astype(np.float64) * right[None, k]).astype(np.float32).astype(np.float64)
    return bool(np.array_equal((left @ right).astype(np.float64), exact))


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
    if adds_in_order():
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
