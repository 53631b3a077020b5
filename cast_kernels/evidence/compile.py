"""`cast-kernels compile`: compile every kernel that the product launches ahead of time, and judge it by gates.

This shows that the kernels compile, their resources, and their instructions. It does not show that they compute the
right values (`cast-kernels emulate`) or how fast they are (a GPU).
"""

from __future__ import annotations

import multiprocessing
import re
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from ptx_emulator.predict.resources import resources
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launch, Record, Recorder, offline_driver
from rich.console import Console
from rich.table import Table

from cast_kernels.evidence.cases import KINDS, run
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.defects import shown
from cast_kernels.evidence.experts import ExpertCase, run_expert
from cast_kernels.evidence.gates import EXCEPTIONS, Exceptions, Key, Row, judge, loose, unused
from cast_kernels.evidence.problems import PROBLEMS, AnyCase
from cast_kernels.evidence.rows import keep


def compile_target(name: str, dtype: str, cases: Sequence[AnyCase], cache: Path) -> list[Row]:
    """Compile the launches of one target and dtype, and read the results.

    Args:
        name: of the target.
        dtype: key of :data:`~cast_kernels.evidence.cases.KINDS`.
        cases: run in turn; a kernel of several cases is one row.
        cache: folder of compiled kernels.
    """
    return [read(record.first, dtype, among) for record, among in launched(name, dtype, cases, cache).values()]


def launched(name: str, dtype: str, cases: Sequence[AnyCase], cache: Path) -> dict[str, tuple[Record, list[str]]]:
    """Each compiled kernel of one target and dtype, with the cases that launch it."""
    found: dict[str, tuple[Record, list[str]]] = {}
    for case in cases:
        with offline_driver(target(name), Recorder(), cache) as recorder:
            if isinstance(case, ExpertCase):
                run_expert(case, **KINDS[dtype]._asdict())
            else:
                run(case, "triton", **KINDS[dtype]._asdict())
        for identity, record in recorder.records.items():
            found.setdefault(identity, (record, []))[1].append(str(case))
    return found


def read(launch: Launch, dtype: str, cases: Iterable[str]) -> Row:
    """One compiled kernel as a row, before :func:`judge`."""
    asm, goal = launch.asm, launch.target
    found = resources(asm, launch.metadata.shared, launch.metadata.num_warps, goal)
    failures = dots_elsewhere(asm["ttgir"])
    if goal.backend == "cuda":
        failures += shown(asm["ptx"], asm["cubin"], int(goal.arch))
    return Row(
        goal.name, dtype, launch.kernel, describe_tile(launch), tuple(cases), found,
        len(tensor_core_dots(asm["ttir"])), launch.constexprs.get("D", 0) > 384, tuple(failures),
    )  # fmt: skip


def describe_tile(launch: Launch) -> str:
    """The compile-time arguments by name (numbers, words, true flags), and the warps."""
    parts = []
    for name, value in launch.constexprs.items():
        if name.isupper() and value is not None and value is not False:
            parts.append(name if value is True else f"{name}={value}")
    return " ".join([*parts, f"warps={launch.metadata.num_warps}"])


_DOT = re.compile(
    r"tt\.dot (?P<operands>[^:]*):\s*tensor<(?:\d+x)+(?P<type>\w+).*? \* .*-> tensor<[^#>]*(?P<layout>#\w+)?"
)


def tensor_core_dots(ir: str) -> list[str]:
    """Element types of the matrix products in Triton's IR that fit tensor cores: 16-bit types, and tf32."""
    products = (m for line in ir.splitlines() if (m := _DOT.search(line)))
    return [m["type"] for m in products if m["type"] in ("bf16", "f16") or "tf32" in m["operands"]]


def dots_elsewhere(ttgir: str) -> list[str]:
    """A failure for each kind of such product that Triton laid out for the ordinary multipliers instead."""
    slow = [m for line in ttgir.splitlines() if (m := _DOT.search(line)) and (m["layout"] or "").startswith("#blocked")]
    kinds = {m["type"] for m in slow if m["type"] in ("bf16", "f16") or "tf32" in m["operands"]}
    return [f"a product of {kind} runs on the ordinary multipliers" for kind in sorted(kinds)]


def render(rows: Sequence[Row]) -> Table:
    """A table of the kernels of one target and dtype."""
    title = f"{rows[0].target} {rows[0].dtype}: compiled only, nothing was run"
    table = Table(title=title, title_justify="left")
    table.add_column("kernel", no_wrap=True)
    table.add_column("tile")
    for heading in ("regs", "spills", "in loops", "shared", "CTAs", "warps", "tensor core", "gates"):
        table.add_column(heading, justify="right" if heading in ("regs", "spills", "in loops", "shared") else "left")
    for row in rows:
        used = row.resources
        tensor_core = f"{used.tensor_core_count} {used.tensor_core}" if used.tensor_core else "-"
        table.add_row(
            row.kernel, row.tile, str(used.registers), str(used.spills), str(used.loop_spills),
            str(used.shared_bytes), str(used.ctas), f"{used.occupancy:.0%}", tensor_core,
            "FAIL" if row.failures else ("exception" if row.allowed else "ok"),
        )  # fmt: skip
    return table


def main(
    targets: Sequence[str],
    dtypes: Sequence[str],
    problems: str,
    json_file: Path | None = None,
    cache: Path | None = None,
    exceptions: Exceptions = EXCEPTIONS,
) -> int:
    """Compile in two processes, print, and return the exit code: 1 if a gate fails.

    Args:
        targets: names of targets.
        dtypes: keys of :data:`~cast_kernels.evidence.cases.KINDS`.
        problems: key of :data:`PROBLEMS`.
        json_file: file for the rows as JSON, written after each target and dtype; see
            :func:`~cast_kernels.evidence.rows.keep`.
        cache: folder of compiled kernels for reuse; None for a temporary one.
        exceptions: from the tile table.
    """
    goals = [target(name) for name in targets]  # a wrong name fails before the compiler runs
    console, rows = wide_console(), []
    with tempfile.TemporaryDirectory(prefix="cast-kernels-") as temporary:
        jobs = [(goal.name, dtype, PROBLEMS[problems], cache or Path(temporary)) for goal in goals for dtype in dtypes]
        with ProcessPoolExecutor(min(2, len(jobs)), multiprocessing.get_context("spawn")) as pool:
            for found in pool.map(compile_target, *zip(*jobs, strict=True)):
                judged = [judge(row, exceptions) for row in found]
                rows += judged
                console.print(render(judged))
                if json_file:
                    keep([asdict(row) for row in judged], json_file)
    # "step" does not launch every kernel with an exception; only "all" finds the largest numbers of spills.
    _report(console, rows, {} if problems == "step" else exceptions)
    if problems == "all":
        for key, largest in loose(rows, exceptions):
            line = f"{_name(key)} allows {exceptions[key].loop_spills}, the largest found is {largest}"
            console.print(f"loose: the exception for {line}", markup=False, soft_wrap=True)
    return 1 if any(row.failures for row in rows) else 0


def _name(key: Key) -> str:
    name, kernel, bits, wide = key
    return f"{name} {kernel}, {bits} bits{', d above 384' if wide else ''}"


def _report(console: Console, rows: Sequence[Row], exceptions: Exceptions) -> None:
    for row in rows:
        if row.allowed:
            console.print(
                f"exception  {row.target} {row.kernel} {row.dtype}: {row.allowed}", markup=False, soft_wrap=True
            )
    for key in unused(rows, exceptions):
        console.print(f"not needed: the exception for {_name(key)}", markup=False, soft_wrap=True)
    for row in rows:
        for failure in row.failures:
            console.print(
                f"FAIL  {row.target} {row.kernel} [{row.tile}] {row.dtype}: {failure}", markup=False, soft_wrap=True
            )
    failed = sum(bool(row.failures) for row in rows)
    console.print(f"{len(rows)} compiled kernels, {failed} fail a gate", markup=False, soft_wrap=True)
