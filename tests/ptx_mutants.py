"""Plant every fault of `ptx_emulator.mutants` in the launches of `mutant_subjects.py`, and keep what became of each.

    python tests/ptx_mutants.py                # all kernels
    python tests/ptx_mutants.py gemm.cu        # those whose names contain a word; the rows of others stay

Writes benchmarks/evidence/ptx_mutants.json, a row a mutant, and the table ptx_mutants.md beside it. Exit status 1 if a
mutant is missed, that is, if nothing sees it and no reason is known why it changes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from heavy import circumstances
from mutant_reasons import reason
from mutant_subjects import SUBJECTS
from ptx_emulator.mutants import Subject, Verdict, judge, mutants
from ptx_emulator.mutants.judge import FOUND, REFUSED, STOPPED, UNREACHED, VALUES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/evidence/ptx_mutants.json"
TABLE = RESULTS.with_suffix(".md")
COLUMNS = ("kernel", "family", "line of the PTX", "instruction", "change", "what became of it", "by or why", "landing")
CAUGHT = (FOUND, STOPPED, REFUSED, VALUES)
EQUIVALENT, MISSED = "equivalent", "missed"
Row = list[Any]


def row_of(subject: Subject, verdict: Verdict) -> Row:
    """What is kept of a mutant."""
    mutant = verdict.mutant
    how, by = verdict.how, verdict.by
    if not how and by == UNREACHED:
        how = UNREACHED
    elif not how:
        by = by or ("" if verdict.change else reason(subject, mutant))
        how = EQUIVALENT if by else MISSED
        by = by or (f"values change by {verdict.change:.1e}" if verdict.change else "")
    return [
        subject.name, mutant.family, mutant.line, mutant.instruction[:110], mutant.change, how, by, verdict.landing
    ]  # fmt: skip


def judged(subject: Subject) -> Iterable[Row]:
    """A row for each mutant of a launch."""
    right = subject.right()
    for mutant in mutants(subject.record):
        yield row_of(subject, judge(subject, mutant, right))


def compiler(subject: Subject) -> str:
    """What made the PTX, by its version: another one makes other PTX."""
    found = re.search(r"Cuda compilation tools, [^\n]*", subject.record.ptx)
    return found[0] if found else f"Triton {version('triton')}"


def read() -> dict[str, Any]:
    """What is kept: {"made": circumstances by kernel, "columns": names, "mutants": rows}."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"made": {}, "columns": COLUMNS, "mutants": []}


def write(kept: dict[str, Any]) -> None:
    """The JSON file, a row a line, and the table."""
    made = ",\n".join(f" {json.dumps(name)}: {json.dumps(one)}" for name, one in kept["made"].items())
    rows = ",\n".join(json.dumps(row) for row in kept["mutants"])
    columns = json.dumps(list(COLUMNS))
    RESULTS.write_text(f'{{"made": {{\n{made}\n}},\n"columns": {columns},\n"mutants": [\n{rows}\n]}}\n')
    TABLE.write_text(table(kept))


def counted(words: Sequence[str]) -> str:
    return ", ".join(f"{word} {number}" for word, number in Counter(words).most_common())


def table(kept: dict[str, Any]) -> str:
    """Kernel and family: planted, caught and by what, equivalent and why, missed."""
    lines = [
        "# Faults planted mechanically in the PTX", "",
        "Made by `python tests/ptx_mutants.py`, in emulation; docs/ptx_emulator.md says what it shows. A mutant whose",
        "instruction no run reaches is in the JSON file and in no column here.", "",
        "| kernel | family | planted | caught | by | equivalent | missed |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    rows = [row for row in kept["mutants"] if row[5] != UNREACHED]
    for kernel, family in dict.fromkeys((row[0], row[1]) for row in rows):
        lines.append(_line(kernel, family, [row for row in rows if row[:2] == [kernel, family]]))
    for kernel in dict.fromkeys(row[0] for row in rows):
        lines.append(_line(f"**{kernel}**", "all", [row for row in rows if row[0] == kernel]))
    lines.append(_line("**all**", "all", rows))
    lines += [
        "",
        "## Why the equivalent ones change nothing",
        "",
        "| kernel | family | reason | how many |",
        "|---|---|---|---|",
    ]
    why = Counter((row[0], row[1], row[6]) for row in rows if row[5] == EQUIVALENT)
    lines += [f"| {kernel} | {family} | {by} | {number} |" for (kernel, family, by), number in why.items()]
    lines += ["", "## Missed", ""]
    missed = [row for row in rows if row[5] == MISSED]
    lines += [f"- {row[0]}, line {row[2]}, `{row[3]}`: {row[4]}; {row[6]}" for row in missed] or ["None."]
    return "\n".join(lines) + "\n"


def _line(kernel: str, family: str, rows: Sequence[Row]) -> str:
    caught = [row[6] for row in rows if row[5] in CAUGHT]
    same, missed = (sum(row[5] == what for row in rows) for what in (EQUIVALENT, MISSED))
    by = counted([row[5] for row in rows if row[5] in CAUGHT]) if family == "all" else counted(caught)
    return f"| {kernel} | {family} | {len(rows)} | {len(caught)} | {by} | {same} | {missed} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only kernels whose names contain one of these")
    given = parser.parse_args(arguments)
    kept, status = read(), 0
    for name in [name for name in SUBJECTS if not given.words or any(word in name for word in given.words)]:
        subject = SUBJECTS[name]()
        rows = list(judged(subject))
        former = [row for row in kept["mutants"] if row[0] in SUBJECTS and row[0] != name] + rows
        order = {one: number for number, one in enumerate(SUBJECTS)}
        kept["mutants"] = sorted(former, key=lambda row: order[row[0]])
        kept["made"] = {n: kept["made"][n] for n in SUBJECTS if n in kept["made"] and n != name}
        kept["made"][name] = {**circumstances(), "compiler": compiler(subject)}
        write(kept)
        print(f"{name}: {counted([row[5] for row in rows])}", flush=True)
        status |= any(row[5] == MISSED for row in rows)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
