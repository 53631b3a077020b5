"""`cast-kernels compile`: every kernel that the product launches, compiled ahead of time, measured against gates.

Known from this: that the kernels compile, what they take of the chip, which instructions they became. Not known: that
they compute the right thing (`cast-kernels emulate`) and how fast they are (a GPU).
"""

from __future__ import annotations

import json
import multiprocessing
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cast_kernels.evidence.cases import DTYPES, KINDS, Case, run
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.driver import Launch, Record, Recorder, offline_driver
from cast_kernels.evidence.experts import ExpertCase, run_expert
from cast_kernels.evidence.resources import Resources, resources
from cast_kernels.evidence.targets import target
from cast_kernels.triton.tiles import EXCEPTIONS, Allowance

_PAPER = Case(batch=6)
AnyCase = Case | ExpertCase

#: What is compiled. Step: one training step of the published sizes with default settings, with six clips and with one,
#: for which some tables have tiles of their own. Paper: every recompute level
#: and inference too, the experts with both of their activations. All: also other windows, head dimensions 16 and 64, a
#: wide bottleneck and a wide adapter, each direction alone, drop-path, no positions.
PROBLEMS: dict[str, tuple[AnyCase, ...]] = {
    "step": (_PAPER, replace(_PAPER, batch=1), ExpertCase()),
    "paper": (
        *(replace(_PAPER, recompute=level) for level in ("cheap", "nothing", "all")),
        replace(_PAPER, backward=False),
        *(replace(_PAPER, batch=1, backward=train) for train in (True, False)),
        ExpertCase(),
        ExpertCase(activation="quick_gelu", recompute="nothing"),
    ),
}
PROBLEMS["all"] = (
    *PROBLEMS["paper"],
    replace(_PAPER, windows=("space-time", "space-time")),
    replace(_PAPER, windows=("space", "time")),
    replace(_PAPER, heads=24),
    replace(_PAPER, heads=6),
    replace(_PAPER, bottleneck=768),
    replace(_PAPER, directions=("t2s",), positions=False, scaled=True),
    replace(_PAPER, directions=("s2t",), positions=False, scaled=True),
    ExpertCase(scaled=True),
    ExpertCase(adapter=768),
)


#: (architecture, kernel, bits of an operand, whether its bottleneck is above 384).
Key = tuple[str, str, int, bool]
Exceptions = Mapping[Key, Allowance]


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
    wide: bool = False  # a bottleneck above 384; False for a kernel that does not know it
    failures: tuple[str, ...] = field(default=())
    allowed: str = ""  # the exception that was needed, with its reason

    @property
    def key(self) -> Key:
        """As the tile table names it."""
        return self.target, self.kernel, 8 * KINDS[self.dtype].compute.itemsize, self.wide


def compile_target(name: str, dtype: str, cases: Sequence[AnyCase], cache: Path) -> list[Row]:
    """Compile what the product launches on one target in one dtype, and read the result.

    Args:
        name: of the target.
        dtype: key of :data:`~cast_kernels.evidence.cases.KINDS`.
        cases: run one after another; a kernel that several of them launch is one row.
        cache: folder of compiled kernels.
    """
    found: dict[str, tuple[Record, list[str]]] = {}
    for case in cases:
        with offline_driver(target(name), Recorder(), cache) as recorder:
            if isinstance(case, ExpertCase):
                run_expert(case, **KINDS[dtype]._asdict())
            else:
                run(case, "triton", **KINDS[dtype]._asdict())
        for identity, record in recorder.records.items():
            found.setdefault(identity, (record, []))[1].append(str(case))
    return [read(record.first, dtype, launching) for record, launching in found.values()]


def read(launch: Launch, dtype: str, cases: Iterable[str]) -> Row:
    """One compiled kernel as a row, not yet judged."""
    found = resources(launch.asm, launch.metadata.shared, launch.metadata.num_warps, launch.target)
    return Row(
        launch.target.name, dtype, launch.kernel, describe_tile(launch), tuple(cases), found,
        len(tensor_core_dots(launch.asm["ttir"])), launch.constexprs.get("D", 0) > 384,
        tuple(dots_elsewhere(launch.asm["ttgir"])),
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
    allowance = exceptions.get(row.key)
    failures, needed = list(row.failures), []
    if used.shared_bytes > goal.shared_limit:
        failures.append(f"{used.shared_bytes} bytes of shared memory; {goal.name} allows {goal.shared_limit}")
    if used.loop_spills:
        spilled = f"{used.loop_spills} spill instructions inside loops"
        if allowance and used.loop_spills <= allowance.loop_spills:
            needed.append(f"{spilled}, {allowance.loop_spills} allowed")
        else:
            failures.append(spilled + (f"; the exception allows {allowance.loop_spills}" if allowance else ""))
    # Every kind counts: "HGMMA+HMMA" is a kernel in which one of several products fell back to mma.sync.
    kinds = used.tensor_core.split("+")
    others = [kind for kind in kinds if not re.fullmatch(goal.tensor_core, kind)]
    if row.dots and others:
        also = " as well as" if len(others) < len(kinds) else " instead of"
        came = f"{'+'.join(others) or 'no tensor-core instruction'}{also} {goal.instruction}"
        if allowance and allowance.tensor_core and others == [allowance.tensor_core]:
            needed.append(came)
        else:
            failures.append(came)
    reason = f"{'; '.join(needed)}: {allowance.reason}" if needed and allowance else ""
    return replace(row, failures=tuple(failures), allowed=reason)


def unused(rows: Sequence[Row], exceptions: Exceptions) -> list[Key]:
    """Exceptions of what was compiled that no kernel needed: they must go, or they hide the next spill."""
    needed = {row.key for row in rows if row.allowed}
    compiled = {(row.key[0], *row.key[2:]) for row in rows}
    return [key for key in exceptions if (key[0], *key[2:]) in compiled and key not in needed]


def loose(rows: Sequence[Row], exceptions: Exceptions) -> list[tuple[Key, int]]:
    """Exceptions that allow more spill instructions than any kernel has, and the largest number found: the rest of what
    they allow hides the next spill.

    Args:
        rows: judged, of every problem. Nothing is known of operand sizes of which a dtype was not compiled.
        exceptions: those of :func:`unused` are left out.
    """
    compiled = {(row.target, row.dtype) for row in rows}
    found = []
    for key, allowance in exceptions.items():
        dtypes = [name for name, dtype in DTYPES.items() if 8 * dtype.itemsize == key[2]]
        own = [row for row in rows if row.key == key]
        largest = max((row.resources.loop_spills for row in own), default=0)
        known = compiled >= {(key[0], dtype) for dtype in dtypes} and any(row.allowed for row in own)
        if known and largest < allowance.loop_spills:
            found.append((key, largest))
    return found


def render(rows: Sequence[Row]) -> Table:
    """The kernels of one target and dtype as a table for people."""
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
    """Compile, two processes side by side, print, and return the exit code: 1 if a gate fails.

    Args:
        targets: names of targets.
        dtypes: keys of :data:`~cast_kernels.evidence.cases.KINDS`.
        problems: key of :data:`PROBLEMS`.
        json_file: where the rows go as JSON.
        cache: folder of compiled kernels that may be used again; None for a temporary one.
        exceptions: from the tile table.
    """
    goals = [target(name) for name in targets]  # a wrong name must not wait for the compiler
    console, rows = wide_console(), []
    with tempfile.TemporaryDirectory(prefix="cast-kernels-") as temporary:
        jobs = [(goal.name, dtype, PROBLEMS[problems], cache or Path(temporary)) for goal in goals for dtype in dtypes]
        with ProcessPoolExecutor(min(2, len(jobs)), multiprocessing.get_context("spawn")) as pool:
            for found in pool.map(compile_target, *zip(*jobs, strict=True)):
                judged = [judge(row, exceptions) for row in found]
                rows += judged
                console.print(render(judged))
    # One step does not launch everything that an exception may be for, and only "all" everything that may spill most.
    _report(console, rows, {} if problems == "step" else exceptions)
    if problems == "all":
        for key, largest in loose(rows, exceptions):
            line = f"{_name(key)} allows {exceptions[key].loop_spills}, the largest found is {largest}"
            console.print(f"loose: the exception for {line}", markup=False, soft_wrap=True)
    if json_file:
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)  # one row a line: short, and differences show
        json_file.write_text(f"[\n{lines}\n]\n")
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
