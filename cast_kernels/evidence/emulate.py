"""`cast-kernels emulate`: forward and backward from compiled PTX on CPU tensors, compared with fp64.

The product's own launch path runs; the emulator replaces the GPU. This shows the values that the compiled code
computes, and that it broke no rule. It does not show the result of ptxas, or the speed.
"""

from __future__ import annotations

import datetime
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptx_emulator.targets import Target, target
from ptx_emulator.triton.driver import offline_driver
from ptx_emulator.triton.launcher import EmulationFault, Emulator, KernelRuns
from rich.table import Table

from cast_kernels.evidence.cases import KINDS, Case, Error, compare, poisoned_memory, run
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.problems import SIZES
from cast_kernels.evidence.useful import useful_flops


@dataclass
class Outcome:
    """One case on one target."""

    case: Case
    errors: list[Error]
    kernels: dict[str, KernelRuns]
    seconds: float
    fault: str = ""
    engine: str = "interpreter"

    @property
    def ok(self) -> bool:
        return not self.fault and all(error.ok for error in self.errors)


def emulate(goal: Target, case: Case, dtype: str, cache: Path | None = None, engine: str | None = None) -> Outcome:
    """Run one case from compiled code and measure it.

    Args:
        goal: target of the compilation.
        case: the problem.
        dtype: a key of :data:`~cast_kernels.evidence.cases.KINDS`.
        cache: folder of compiled kernels, None for a temporary one.
        engine: of the emulator; None for the fastest that is built.
    """
    kind = KINDS[dtype]._asdict()
    exact, eager = run(case, None, exact=True, **kind), run(case, "eager", **kind)
    emulator, begin = Emulator(engine=engine), time.perf_counter()
    errors, fault = [], ""
    try:
        with offline_driver(goal, emulator, cache), poisoned_memory():
            errors = compare(run(case, "triton", **kind), eager, exact)
    except EmulationFault as error:
        fault = str(error)
    return Outcome(case, errors, emulator.runs, time.perf_counter() - begin, fault, emulator.engine)


def render_errors(outcome: Outcome) -> Table:
    """Every tensor's error and eager's."""
    table = Table("tensor", "rms error", "eager's", "ratio", "largest", "eager's", "", title_justify="left")
    for e in outcome.errors:
        numbers = (f"{x:.2e}" for x in (e.worst, e.eager_worst))
        table.add_row(e.name, f"{e.rms:.2e}", f"{e.eager_rms:.2e}", f"{e.ratio:.2f}", *numbers, "" if e.ok else "FAIL")
    return table


#: Heading -> counter, and the counter without bank conflicts or "".
_COLUMNS = {
    "tensor MFLOP": ("tensor_flops", ""),
    "instructions": ("warp_instructions", ""),
    "load sectors": ("global_load_sectors", ""),
    "store sectors": ("global_store_sectors", ""),
    "shared loads": ("shared_load_wavefronts", "shared_load_wavefronts_ideal"),
    "shared stores": ("shared_store_wavefronts", "shared_store_wavefronts_ideal"),
    "barriers": ("barriers", ""),
}


def render_counters(outcome: Outcome) -> Table:
    """The emulator's counters by kernel, over all launches.

    Factors after wavefronts are relative to the ideal. Native: share of the instructions that compiled code executed.
    Useful: share of the tensor FLOPs that the algorithm needs.
    """
    table = Table("kernel", title="executed in emulation; instructions are a warp's", title_justify="left")
    for heading in ("launches", "CTAs", *_COLUMNS, "native", "useful", "seconds"):
        table.add_column(heading, justify="right")
    useful = useful_flops(outcome.case)
    for runs in outcome.kernels.values():
        cells = [_cell(runs, *counters) for counters in _COLUMNS.values()]
        issued = runs.counters["tensor_flops"]
        share = f"{useful[runs.kernel] / issued:.0%}" if issued else ""
        cells += [f"{runs.native:.1%}" if outcome.engine == "native" else "", share, f"{runs.seconds:.1f}"]
        table.add_row(runs.kernel, str(runs.launches), str(runs.ctas), *cells)
    return table


def _cell(runs: KernelRuns, counter: str, ideal: str) -> str:
    count = runs.counters[counter]
    if counter == "tensor_flops":
        return f"{count / 1e6:.1f}"
    factor = f" x{count / runs.counters[ideal]:.2f}" if ideal and runs.counters[ideal] else ""
    return f"{count:,}{factor}"


def as_json(goal: Target, dtype: str, outcome: Outcome) -> dict[str, Any]:
    """One run with all errors and counters, as JSON values."""
    useful = useful_flops(outcome.case)
    return {
        "target": goal.name,
        "dtype": dtype,
        "case": asdict(outcome.case),
        "ok": outcome.ok,
        "engine": outcome.engine,
        "fault": outcome.fault,
        "date": str(datetime.date.today()),
        "seconds": round(outcome.seconds, 1),
        "errors": [error._asdict() | {"ratio": error.ratio, "ok": error.ok} for error in outcome.errors],
        "kernels": [vars(runs) | {"useful_flops": useful[runs.kernel]} for runs in outcome.kernels.values()],
    }


#: The fields that identify a run in a file of runs.
_KEY = ("target", "dtype", "case", "engine")


def keep(told: dict[str, Any], file: Path) -> None:
    """Write a run into a file with one run a line. It replaces the same run; the others stay."""
    runs = json.loads(file.read_text()) if file.exists() else []
    told = json.loads(json.dumps(told))  # tuples as the file has them
    at = next((n for n, run in enumerate(runs) if all(run.get(name) == told[name] for name in _KEY)), len(runs))
    runs[at : at + 1] = [told]
    file.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")


def main(
    targets: Sequence[str],
    dtypes: Sequence[str],
    size: str,
    json_file: Path | None = None,
    engine: str | None = None,
) -> int:
    """Run, print, and return the exit code: 1 after a fault or an error above the gate.

    Args:
        targets: names out of :data:`~cast_kernels.evidence.problems.EMULATED`.
        dtypes: keys of :data:`~cast_kernels.evidence.cases.KINDS`.
        size: key of :data:`SIZES`.
        json_file: file for errors and all counters as JSON, written after each run; see :func:`keep`.
        engine: of the emulator; None for the fastest that is built.
    """
    console, count, failed = wide_console(), 0, 0
    runs = [(target(name), dtype, case) for name in targets for dtype in dtypes for case in SIZES[size]]
    with tempfile.TemporaryDirectory() as cache:
        for goal, dtype, case in runs:
            outcome = emulate(goal, case, dtype, Path(cache), engine=engine)
            console.print(f"{goal.name} {dtype}: {case}, {outcome.seconds:.0f} s", markup=False, highlight=False)
            if outcome.errors:
                console.print(render_errors(outcome))
            console.print(render_counters(outcome))
            if outcome.fault:
                console.print(f"FAIL  {outcome.fault}", markup=False, soft_wrap=True)
            count, failed = count + 1, failed + (not outcome.ok)
            if json_file:
                keep(as_json(goal, dtype, outcome), json_file)
    console.print(f"{count} runs in emulation, {failed} failed")
    return 1 if failed else 0
