"""`cast-kernels compile`: every kernel that the product launches, compiled ahead of time, measured against gates.

Known from this: that the kernels compile, what they take of the chip, which instructions they became. Not known: that
they compute the right thing (`cast-kernels emulate`) and how fast they are (a GPU).
"""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table

from cast_kernels.evidence.cases import DTYPES, Case, run
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.driver import Launch, Record, Recorder, offline_driver
from cast_kernels.evidence.resources import Resources, resources
from cast_kernels.evidence.targets import Target, target

_PAPER = Case()

#: The paper's size at every recompute level and for inference, in every dtype.
EVERY_DTYPE: tuple[Case, ...] = (
    *(replace(_PAPER, recompute=level) for level in ("cheap", "nothing", "all")),
    replace(_PAPER, backward=False),
)
#: Further kinds, in the first dtype asked for: other windows, head dimensions 16 and 64, a wide bottleneck.
FIRST_DTYPE: tuple[Case, ...] = (
    replace(_PAPER, windows=("space-time", "space-time")),
    replace(_PAPER, windows=("space", "time")),
    replace(_PAPER, heads=24),
    replace(_PAPER, heads=6),
    replace(_PAPER, bottleneck=768),
    replace(_PAPER, directions=("t2s",), positions=False, scaled=True),
    replace(_PAPER, directions=("s2t",), positions=False, scaled=True),
)


class Allowance(Protocol):
    """What an exception in the tile table allows one kernel, and why."""

    loop_spills: int  # spill instructions inside loops
    tensor_core: str  # opcode that may stand for the target's own, "" for none
    reason: str


#: (architecture, kernel, dtype as on the command line) -> what it is allowed.
Exceptions = Mapping[tuple[str, str, str], Allowance]


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    target: str
    dtype: str
    kernel: str
    tile: str  # constexprs and warps
    cases: tuple[str, ...]  # in which it is launched
    resources: Resources
    dots: int  # matrix products in Triton's IR
    failures: tuple[str, ...] = field(default=())
    allowed: str = ""  # the exception that was needed, with its reason


def compile_target(name: str, dtypes: Sequence[str], cache: Path | None = None) -> list[Row]:
    """Compile what the product launches on one target, and read the result.

    Args:
        name: of the target.
        dtypes: keys of :data:`~cast_kernels.evidence.cases.DTYPES`; the first also gets :data:`FIRST_DTYPE`.
        cache: folder of compiled kernels, None for a temporary one.
    """
    goal, rows = target(name), []
    for position, dtype in enumerate(dtypes):
        found: dict[str, tuple[Record, list[str]]] = {}
        for case in EVERY_DTYPE + (FIRST_DTYPE if position == 0 else ()):
            with offline_driver(goal, Recorder(), cache) as recorder:
                run(case, "triton", DTYPES[dtype])
            for identity, record in recorder.records.items():
                found.setdefault(identity, (record, []))[1].append(str(case))
        rows += [read(record.first, dtype, cases) for record, cases in found.values()]
    return rows


def read(launch: Launch, dtype: str, cases: Iterable[str]) -> Row:
    """One compiled kernel as a row, not yet judged."""
    found = resources(launch.asm, launch.metadata.shared, launch.metadata.num_warps, launch.target)
    return Row(
        launch.target.name, dtype, launch.kernel, describe_tile(launch), tuple(cases), found,
        len(tensor_core_dots(launch.asm["ttir"])), tuple(dots_elsewhere(launch.asm["ttgir"])),
    )  # fmt: skip


def describe_tile(launch: Launch) -> str:
    """What was compiled in, by name: numbers, words and what is true; warps."""
    parts = []
    for name, value in launch.constexprs.items():
        if name.isupper() and value is not None and value is not False:
            parts.append(name if value is True else f"{name}={value}")
    return " ".join([*parts, f"warps={launch.metadata.num_warps}"])


_DOT = re.compile(
    r"tt\.dot (?P<operands>[^:]*):\s*tensor<(?:\d+x)+(?P<type>\w+).*? \* .*-> tensor<[^#>]*(?P<layout>#\w+)?"
)


def tensor_core_dots(ir: str) -> list[str]:
    """Element types of the products in Triton's IR that a tensor core can take: 16-bit ones, and tf32."""
    products = (m for line in ir.splitlines() if (m := _DOT.search(line)))
    return [m["type"] for m in products if m["type"] in ("bf16", "f16") or "tf32" in m["operands"]]


def dots_elsewhere(ttgir: str) -> list[str]:
    """A failure for each kind of tensor-core product that Triton laid out for the ordinary multipliers instead."""
    slow = [m for line in ttgir.splitlines() if (m := _DOT.search(line)) and (m["layout"] or "").startswith("#blocked")]
    kinds = {m["type"] for m in slow if m["type"] in ("bf16", "f16") or "tf32" in m["operands"]}
    return [f"a product of {kind} runs on the ordinary multipliers" for kind in sorted(kinds)]


def judge(row: Row, exceptions: Exceptions) -> Row:
    """The row with the gates that it fails, and with the exception that it needed."""
    goal, used = target(row.target), row.resources
    allowance = exceptions.get((row.target, row.kernel, row.dtype))
    failures, needed = list(row.failures), []
    if used.shared_bytes > goal.shared_limit:
        failures.append(f"{used.shared_bytes} bytes of shared memory; {goal.name} allows {goal.shared_limit}")
    if used.loop_spills:
        spilled = f"{used.loop_spills} spill instructions inside loops"
        if allowance and used.loop_spills <= allowance.loop_spills:
            needed.append(f"{spilled}, {allowance.loop_spills} allowed")
        else:
            failures.append(spilled + (f"; the exception allows {allowance.loop_spills}" if allowance else ""))
    if row.dots and not re.search(goal.tensor_core, used.tensor_core):
        came = f"{used.tensor_core or 'no tensor-core instruction'} instead of {goal.instruction}"
        if allowance and allowance.tensor_core and allowance.tensor_core in used.tensor_core.split("+"):
            needed.append(came)
        else:
            failures.append(came)
    reason = f"{'; '.join(needed)}: {allowance.reason}" if needed and allowance else ""
    return replace(row, failures=tuple(failures), allowed=reason)


def unused(rows: Sequence[Row], exceptions: Exceptions) -> list[tuple[str, str, str]]:
    """Exceptions of what was compiled that no kernel needed: they must go, or they hide the next spill."""
    needed = {(row.target, row.kernel, row.dtype) for row in rows if row.allowed}
    compiled = {(row.target, row.dtype) for row in rows}
    return [key for key in exceptions if (key[0], key[2]) in compiled and key not in needed]


def render(goal: Target, rows: Sequence[Row]) -> Table:
    """One target's kernels as a table for people."""
    table = Table(title=f"{goal.name}: compiled only, nothing was run", title_justify="left")
    table.add_column("kernel", no_wrap=True)
    table.add_column("tile")
    for heading in ("dtype", "regs", "spills", "in loops", "shared", "CTAs", "warps", "tensor core", "gates"):
        table.add_column(heading, justify="right" if heading in ("regs", "spills", "in loops", "shared") else "left")
    for row in rows:
        used = row.resources
        tensor_core = f"{used.tensor_core_count} {used.tensor_core}" if used.tensor_core else "-"
        table.add_row(
            row.kernel, row.tile, row.dtype, str(used.registers), str(used.spills), str(used.loop_spills),
            str(used.shared_bytes), str(used.ctas), f"{used.occupancy:.0%}", tensor_core,
            "FAIL" if row.failures else ("exception" if row.allowed else "ok"),
        )  # fmt: skip
    return table


def main(targets: Sequence[str], dtypes: Sequence[str], json_file: Path | None, exceptions: Exceptions) -> int:
    """Compile for every target, two at a time, print, and return the exit code: 1 if a gate fails."""
    console = wide_console()
    goals = [target(name) for name in targets]  # a wrong name must not wait for the compiler
    pool = ProcessPoolExecutor(min(2, len(goals)), multiprocessing.get_context("spawn"))
    rows: list[Row] = []
    with pool:
        for goal, found in zip(goals, pool.map(compile_target, targets, [dtypes] * len(goals)), strict=True):
            judged = [judge(row, exceptions) for row in found]
            rows += judged
            console.print(render(goal, judged))
    _report(console, rows, exceptions)
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if any(row.failures for row in rows) else 0


def _report(console: Console, rows: Sequence[Row], exceptions: Exceptions) -> None:
    for row in rows:
        if row.allowed:
            console.print(f"exception  {row.target} {row.kernel} {row.dtype}: {row.allowed}", markup=False)
    for key in unused(rows, exceptions):
        console.print(f"not needed: the exception for {' '.join(key)}", markup=False)
    for row in rows:
        for failure in row.failures:
            console.print(f"FAIL  {row.target} {row.kernel} [{row.tile}] {row.dtype}: {failure}", markup=False)
    failed = sum(bool(row.failures) for row in rows)
    console.print(f"{len(rows)} compiled kernels, {failed} fail a gate", markup=False)
