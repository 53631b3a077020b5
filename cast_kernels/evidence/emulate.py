"""`cast-kernels emulate`: forward and backward from compiled PTX on CPU tensors, against fp64.

What runs is the product's own launch path; the emulator takes the place of the GPU. Known from this: the values that
the compiled code computes, and that it broke no rule on the way. Not known: what ptxas makes of it, and how fast.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from cast_kernels.evidence.cases import DTYPES, Case, Error, compare, poisoned_memory, run
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.driver import offline_driver
from cast_kernels.evidence.emulator import EmulationFault, Emulator, KernelRuns
from cast_kernels.evidence.targets import Target, target

_SMALL = Case(2, 3, 7, 64, 32, 2, scaled=True)

#: Size -> what is run. Small: every window, each direction alone, awkward sizes. Paper: forward of one clip at the
#: published size; backward where it fits a test's patience.
SIZES: dict[str, tuple[Case, ...]] = {
    "small": (
        _SMALL,
        replace(_SMALL, windows=("space-time", "space-time"), recompute="nothing"),
        replace(_SMALL, directions=("t2s",), recompute="all"),
        replace(_SMALL, directions=("s2t",), positions=False),
    ),
    "paper": (
        Case(batch=1, backward=False),
        Case(batch=1, frames=4, patches=36, dim=256, bottleneck=128, heads=4),
    ),
}

#: The architectures whose PTX the emulator knows.
TARGETS = ("sm_80", "sm_90")


@dataclass
class Outcome:
    """One case on one target."""

    case: Case
    errors: list[Error]
    kernels: dict[str, KernelRuns]
    seconds: float
    fault: str = ""

    @property
    def ok(self) -> bool:
        return not self.fault and all(error.ok for error in self.errors)


def emulate(goal: Target, case: Case, dtype: str, cache: Path | None = None) -> Outcome:
    """Run one case from compiled code and measure it.

    Args:
        goal: what to compile for.
        case: the problem.
        dtype: of streams and parameters, a key of :data:`~cast_kernels.evidence.cases.DTYPES`.
        cache: folder of compiled kernels, None for a temporary one.
    """
    kind = DTYPES[dtype]
    exact, eager = run(case, None, kind, exact=True), run(case, "eager", kind)
    emulator, begin = Emulator(), time.perf_counter()
    errors, fault = [], ""
    try:
        with offline_driver(goal, emulator, cache), poisoned_memory():
            errors = compare(run(case, "triton", kind), eager, exact)
    except EmulationFault as error:
        fault = str(error)
    return Outcome(case, errors, emulator.runs, time.perf_counter() - begin, fault)


def render_errors(outcome: Outcome) -> Table:
    """Every tensor's error beside eager's."""
    table = Table("tensor", "rms error", "eager's", "ratio", "largest", "eager's", "", title_justify="left")
    for e in outcome.errors:
        numbers = (f"{x:.2e}" for x in (e.worst, e.eager_worst))
        table.add_row(e.name, f"{e.rms:.2e}", f"{e.eager_rms:.2e}", f"{e.ratio:.2f}", *numbers, "" if e.ok else "FAIL")
    return table


def render_counters(outcome: Outcome) -> Table:
    """What the emulator counted, by kernel, over all launches."""
    names = sorted({name for runs in outcome.kernels.values() for name in runs.counters})
    table = Table("kernel", "launches", "CTAs", *names, "seconds", title="executed in emulation", title_justify="left")
    for runs in outcome.kernels.values():
        counted = (f"{runs.counters[name]:,}" for name in names)
        table.add_row(runs.kernel, str(runs.launches), str(runs.ctas), *counted, f"{runs.seconds:.1f}")
    return table


def main(targets: Sequence[str], dtypes: Sequence[str], size: str) -> int:
    """Run, print, and return the exit code: 1 after a fault or an error above the gate."""
    console, failed = wide_console(), False
    for goal in [target(name) for name in targets]:
        for dtype in dtypes:
            for case in SIZES[size]:
                outcome = emulate(goal, case, dtype)
                failed |= not outcome.ok
                console.print(f"{goal.name} {dtype}: {case}", markup=False, highlight=False)
                if outcome.fault:
                    console.print(f"FAIL  {outcome.fault}", markup=False)
                else:
                    console.print(render_errors(outcome))
                console.print(render_counters(outcome))
    console.print("FAIL" if failed else "every error is at most twice eager's; no fault", markup=False)
    return 1 if failed else 0
