"""Plant every fault of `ptx_emulator.mutants` in recorded launches, and keep what became of each.

    python tests/ptx_mutants.py                  # the kernels of `mutant_subjects.py`
    python tests/ptx_mutants.py gemm.cu          # those whose names contain a word; the rows of others stay
    python tests/ptx_mutants.py --cuda project   # the same of the CUDA kernels, `cuda_subjects.py`
    python tests/ptx_mutants.py --cuda --most 99 # of each kernel as many of its faults, drawn by a seed

A run may be stopped: the next one takes the rows that it finds, if they are of the same PTX, and goes on.

Writes benchmarks/evidence/ptx_mutants.json or cuda_mutants.json, a row a mutant, and the table beside it. Exit status 1
if a mutant is missed, that is, if nothing sees it and no reason is known why it changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cuda_subjects import CUDA_SUBJECTS
from heavy import circumstances
from mutant_reasons import proof, reason
from mutant_subjects import SUBJECTS
from ptx_emulator.mutants import Mutant, Subject, Verdict, judge, mutants
from ptx_emulator.mutants.judge import FOUND, REFUSED, STOPPED, UNORDERED, UNREACHED, VALUES

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("kernel", "family", "line of the PTX", "instruction", "change", "what became of it", "by or why", "landing")
CAUGHT = (FOUND, STOPPED, REFUSED, VALUES)
EQUIVALENT, MISSED = "equivalent", "missed"
SEED = 2026  # of which faults are drawn where there are too many
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
    return [*_key(subject, mutant), how, by, verdict.landing]


def in_turn(planted: Sequence[Mutant]) -> list[int]:
    """Their numbers in an order drawn by a seed, two that change what is ordered for each that does not.

    So the first of them are a sample.
    """
    numbers = random.Random(SEED).sample(range(len(planted)), len(planted))
    others = [number for number in numbers if planted[number].family in UNORDERED]
    orders = [number for number in numbers if planted[number].family not in UNORDERED]
    rounds = range(max(len(orders) // 40, len(others) // 20) + 1)
    return [n for i in rounds for n in (*orders[40 * i : 40 * i + 40], *others[20 * i : 20 * i + 20])]


def judged(
    subject: Subject,
    most: int | None = None,
    known: Iterable[Row] = (),
    each: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """A row for each mutant of a launch, or for the first `most` in turn and those that are known.

    known: rows of the same launch, which are taken as they are. each: is given what there is after every 25 new rows.
    """
    planted, found = mutants(subject.record), {tuple(row[:5]): row for row in known}
    rows = {n: found[key] for n, one in enumerate(planted) if (key := _key(subject, one)) in found}
    for new, number in enumerate([n for n in in_turn(planted)[:most] if n not in rows], 1):
        rows[number] = row_of(subject, judge(subject, planted[number], subject.right(), proof))
        if each and new % 25 == 0:
            each([rows[one] for one in sorted(rows)])
    return [rows[one] for one in sorted(rows)]


def _key(subject: Subject, mutant: Mutant) -> tuple[Any, ...]:
    return subject.name, mutant.family, mutant.line, mutant.instruction[:110], mutant.change


def compiler(subject: Subject) -> str:
    """What made the PTX, by its version: another one makes other PTX."""
    found = re.search(r"Cuda compilation tools, [^\n]*", subject.record.ptx)
    return found[0] if found else f"Triton {version('triton')}"


def digest(subject: Subject) -> str:
    """Tells the PTX from any other, but for comments, source lines and where the sources lay."""
    code = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)[^\n]*$|\.section.*\Z", "", subject.record.ptx, flags=re.M | re.S)
    return hashlib.sha256(" ".join(code.split()).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Kept:
    """A file of rows, with the table made of it."""

    results: Path
    subjects: Mapping[str, Callable[[], Subject]]
    command: str  # that makes it
    page: str  # that says what it shows

    @property
    def table(self) -> Path:
        """Where the table lies."""
        return self.results.with_suffix(".md")

    def read(self) -> dict[str, Any]:
        """What is kept: {"made": circumstances by kernel, "columns": names, "mutants": rows}."""
        if not self.results.exists():
            return {"made": {}, "columns": COLUMNS, "mutants": []}
        return json.loads(self.results.read_text())

    def write(self, kept: dict[str, Any]) -> None:
        """The JSON file, a row a line, and the table."""
        made = ",\n".join(f" {json.dumps(name)}: {json.dumps(one)}" for name, one in kept["made"].items())
        rows = ",\n".join(json.dumps(row) for row in kept["mutants"])
        columns = json.dumps(list(COLUMNS))
        self.results.write_text(f'{{"made": {{\n{made}\n}},\n"columns": {columns},\n"mutants": [\n{rows}\n]}}\n')
        self.table.write_text(self.made_table(kept))

    def made_table(self, kept: dict[str, Any]) -> str:
        """The table of what is kept."""
        return table(kept, self.command, self.page)

    def known(self, name: str, subject: Subject) -> list[Row]:
        """Rows of this PTX but those that were missed."""
        kept = self.read()
        same = kept["made"].get(name, {}).get("ptx") == digest(subject)
        return [row for row in kept["mutants"] if same and row[0] == name and row[5] != MISSED]

    def replace(self, name: str, subject: Subject, rows: Sequence[Row]) -> None:
        """Keep a kernel's rows in place of those that it has; whatever else the file holds by now stays."""
        kept = self.read()
        former = [row for row in kept["mutants"] if row[0] in self.subjects and row[0] != name]
        order = {one: number for number, one in enumerate(self.subjects)}
        kept["mutants"] = sorted([*former, *rows], key=lambda row: order[row[0]])
        told = {"compiler": compiler(subject), "ptx": digest(subject), "planted": len(mutants(subject.record))}
        kept["made"][name] = {**circumstances(), **told}
        kept["made"] = {one: kept["made"][one] for one in self.subjects if one in kept["made"]}
        self.write(kept)


PTX = Kept(
    ROOT / "benchmarks/evidence/ptx_mutants.json", SUBJECTS, "python tests/ptx_mutants.py", "docs/ptx_emulator.md"
)
CUDA = Kept(
    ROOT / "benchmarks/evidence/cuda_mutants.json", CUDA_SUBJECTS, "python tests/ptx_mutants.py --cuda", "docs/cuda.md"
)


def counted(words: Sequence[str]) -> str:
    return ", ".join(f"{word} {number}" for word, number in Counter(words).most_common())


def table(kept: dict[str, Any], command: str, page: str) -> str:
    """Kernel and family: planted, caught and by what, equivalent and why, missed."""
    lines = [
        "# Faults planted mechanically in the PTX", "",
        f"Made by `{command}`, in emulation; {page} says what it shows. A mutant whose",
        "instruction no run reaches is in the JSON file and in no column here.", "",
        "| kernel | family | planted | caught | by | equivalent | missed |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    rows = [row for row in kept["mutants"] if row[5] != UNREACHED]
    for kernel, family in dict.fromkeys((row[0], row[1]) for row in rows):
        lines.append(_line(kernel, family, [row for row in rows if row[:2] == [kernel, family]]))
    for kernel in dict.fromkeys(row[0] for row in rows):
        lines.append(_line(f"**{kernel}**", "all", [row for row in rows if row[0] == kernel]))
    lines.append(_line("**all**", "all", rows))
    lines += _sampled(kept)
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


def _sampled(kept: dict[str, Any]) -> list[str]:
    """A sentence where a kernel has more faults than rows."""
    rows = Counter(row[0] for row in kept["mutants"])
    fewer = [
        f"{rows[name]:,} of {made['planted']:,} of {name}"
        for name, made in kept["made"].items()
        if rows[name] < made.get("planted", 0)
    ]
    return ["", f"Drawn by a seed: {'; '.join(fewer)}."] if fewer else []


def _line(kernel: str, family: str, rows: Sequence[Row]) -> str:
    caught = [row[6] for row in rows if row[5] in CAUGHT]
    same, missed = (sum(row[5] == what for row in rows) for what in (EQUIVALENT, MISSED))
    by = counted([row[5] for row in rows if row[5] in CAUGHT]) if family == "all" else counted(caught)
    return f"| {kernel} | {family} | {len(rows)} | {len(caught)} | {by} | {same} | {missed} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only kernels whose names contain one of these")
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels' launches")
    parser.add_argument("--most", type=int, help="faults of a kernel, drawn by a seed; without it all")
    parser.add_argument("--anew", action="store_true", help="take no row of a former run of the same PTX")
    given = parser.parse_args(arguments)
    kept, status = CUDA if given.cuda else PTX, 0
    for name in [name for name in kept.subjects if not given.words or any(word in name for word in given.words)]:
        subject = kept.subjects[name]()
        known = [] if given.anew else kept.known(name, subject)
        rows = judged(subject, given.most, known, partial(kept.replace, name, subject))
        kept.replace(name, subject, rows)
        print(f"{name}: {counted([row[5] for row in rows])}", flush=True)
        status |= any(row[5] == MISSED for row in rows)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
