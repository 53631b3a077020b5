"""`cast-kernels emulate --mutants`: the result of each planted fault, as a table and as rows in a file."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptx_emulator import default_engine
from ptx_emulator.targets import Target, target
from rich.table import Table

from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.mutants import HARMLESS, Verdict, judge

#: Columns of a row in a file.
COLUMNS = (
    "target", "dtype", "problem", "kernel", "taken away", "line of the PTX", "instruction", "seen as, or why not",
    "caught",
)  # fmt: skip
Row = list[Any]


def rows_of(goal: Target, dtype: str, verdicts: Iterable[tuple[str, Sequence[Verdict]]]) -> list[Row]:
    """A row for each mutant of some problems."""
    return [
        [
            goal.name, dtype, problem, one.mutant.kernel, one.mutant.kind, one.mutant.line, one.mutant.instruction[:48],
            one.caught_by or one.why, bool(one.caught_by),
        ]
        for problem, found in verdicts
        for one in found
    ]  # fmt: skip


def missed(rows: Iterable[Row]) -> list[Row]:
    """Mutants that nothing caught and that have none of the checked reasons."""
    return [row for row in rows if not row[8] and row[7] not in HARMLESS]


def render(title: str, rows: Sequence[Row], by: Sequence[int] = (2, 3, 4)) -> Table:
    """Numbers of planted and caught faults, their detectors, and the reasons of the others, by these columns."""
    heads = [COLUMNS[column] for column in by]
    table = Table(*heads, "planted", "caught", "by", "not caught, because", title=title, title_justify="left")
    for cells in counted(rows, by):
        table.add_row(*cells)
    return table


def counted(rows: Sequence[Row], by: Sequence[int]) -> list[list[str]]:
    """The cells of a table of the rows."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in by), []).append(row)
    cells = []
    for key, group in groups.items():
        caught, others = ([row[7] for row in group if row[8] == seen] for seen in (True, False))
        cells.append([*key, str(len(group)), str(len(caught)), _words(caught), _words(others)])
    return cells


def _words(words: Sequence[str]) -> str:
    order = sorted(dict.fromkeys(words), key=lambda word: -words.count(word))
    return ", ".join(f"{word} {words.count(word)}" for word in order)


def read(file: Path) -> dict[str, Any]:
    """A file's content: {"made": circumstances by target, dtype and problem, "columns": names, "mutants": rows}."""
    return json.loads(file.read_text()) if file.exists() else {"made": {}, "columns": COLUMNS, "mutants": []}


def keep(file: Path, goal: Target, dtype: str, problem: str, rows: Sequence[Row], made: Mapping[str, Any]) -> None:
    """Write the rows of one problem into a file, one a line. They replace earlier ones of the problem; others stay.

    Args:
        file: created if missing.
        goal: the target of the rows.
        dtype: of the rows.
        problem: of the rows.
        rows: only those of the problem.
        made: circumstances of the rows.
    """
    name = [goal.name, dtype, problem]
    kept = read(file)
    others = [row for row in kept["mutants"] if row[:3] != name]
    lines = ",\n".join(json.dumps(row) for row in sorted(others + list(rows), key=lambda row: row[:3]))
    circumstances = sorted((kept["made"] | {", ".join(name): made}).items())
    told = ",\n".join(f" {json.dumps(key)}: {json.dumps(one)}" for key, one in circumstances)
    columns = json.dumps(list(COLUMNS))
    file.write_text(f'{{"made": {{\n{told}\n}},\n"columns": {columns},\n"mutants": [\n{lines}\n]}}\n')


def main(
    targets: Sequence[str], dtypes: Sequence[str], json_file: Path | None = None, engine: str | None = None,
    every: int = 1, only: Collection[str] | None = None,
) -> int:  # fmt: skip
    """Plant all faults and print the tables; the exit code is 1 if a fault is neither caught nor known to be harmless.

    Args:
        targets: names of targets.
        dtypes: keys of :data:`~cast_kernels.evidence.cases.KINDS`.
        json_file: file for a row of each mutant, written after each problem; see :func:`keep`.
        engine: of the emulator; None for the fastest that is built.
        every: take only each n-th mutant of a kernel.
        only: problems whose kernels are mutated; None for all.
    """
    console, open_questions = wide_console(), 0
    engine = engine or default_engine()
    for goal, dtype in [(target(name), dtype) for name in targets for dtype in dtypes]:
        made = {"date": str(datetime.date.today()), "triton": version("triton"), "engine": engine, "every": every}
        rows, begin = [], time.perf_counter()
        for problem, verdicts in judge(goal, dtype, every, engine, only=only):
            new = rows_of(goal, dtype, [(problem, verdicts)])
            if json_file:
                keep(json_file, goal, dtype, problem, new, made)
            rows += new
        seconds = time.perf_counter() - begin
        console.print(render(f"{goal.name} {dtype}: faults planted in the PTX, executed in emulation", rows))
        unknown, caught = missed(rows), sum(row[8] for row in rows)
        which = "each" if every == 1 else f"one of {every}"
        console.print(
            f"{goal.name} {dtype}, {which}: {len(rows)} planted, {caught} caught, "
            f"{len(rows) - caught - len(unknown)} harmless, {len(unknown)} missed, {seconds:.0f} s",
            markup=False,
            soft_wrap=True,
        )
        for row in unknown:
            line = f"missed  {row[2]}, {row[3]}:{row[5]}  {row[6]}  {row[7]}"
            console.print(line, markup=False, soft_wrap=True)
        open_questions += len(unknown)
    return 1 if open_questions else 0
