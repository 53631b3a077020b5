"""Run the tests marked `heavy` and keep their results: `python tests/heavy.py [-n 2] [-k ...] [FILE ...]`.

All arguments are pytest's. Each test that ends replaces its row of benchmarks/evidence/heavy.json at once, so a run may
be done in parts and survives its end. Exit status 1 unless every test marked `heavy` has a row that passed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/evidence/heavy.json"


class Recorder:
    """A pytest plugin that writes a row for each test that ends.

    Args:
        results: the file; rows of tests that do not run now stay as they are.
        circumstances: what a row says besides the test's name, outcome and seconds.
    """

    def __init__(self, results: Path, circumstances: dict[str, str]) -> None:
        self.results, self.circumstances = results, circumstances
        self.rows = {row["test"]: row for row in read(results)}
        self.seconds: dict[str, float] = {}
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of set-up, call and tear-down; the worst counts, and the seconds of all."""
        name = report.nodeid
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration
        if report.when == "setup" or self.outcomes[name] == "passed":
            self.outcomes[name] = report.outcome
        if report.when == "teardown":
            row = {"test": name, "outcome": self.outcomes[name], "seconds": round(self.seconds[name], 1)}
            self.rows[name] = row | self.circumstances
            write(self.results, [self.rows[name] for name in sorted(self.rows)])


class Names:
    """A pytest plugin that keeps the names of what was collected, and of files with heavy tests that were skipped."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.skipped: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped and "mark.heavy" in (ROOT / report.nodeid).read_text():
            self.skipped.append(report.nodeid)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = [item.nodeid for item in session.items]


def read(results: Path) -> list[dict[str, Any]]:
    return json.loads(results.read_text()) if results.exists() else []


def write(results: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A row a line, as the files beside it have them; a reader finds the old file or the new one."""
    beside = results.with_name(f".{results.name}.{os.getpid()}")
    beside.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    beside.replace(results)


def circumstances() -> dict[str, str]:
    """Date, commit, machine and versions of a run."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS.relative_to(ROOT)}")
    words = {"date": date.today().isoformat(), "commit": f"{commit}, with changes" if changed else commit}
    words["machine"] = f"{len(os.sched_getaffinity(0))} cores, {_processor()}"
    words["versions"] = f"Python {platform.python_version()}, torch {version('torch')}, Triton {version('triton')}"
    return words


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def lacking(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of the tests, those without a row that passed, each with why. A skipped test has not passed."""
    outcomes = {row["test"]: row["outcome"] for row in rows}
    return [f"{name}: {outcomes.get(name, 'no result')}" for name in names if outcomes.get(name) != "passed"]


def main(arguments: Sequence[str]) -> int:
    """Run, record, and say what is lacking."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # as `python -m pytest` has it: this tree is tested, whichever is installed
    recorder = Recorder(RESULTS, circumstances())
    status = int(pytest.main(["-m", "heavy", *arguments], plugins=[recorder]))
    if status > 1 or not recorder.outcomes:
        return status  # interrupted, bad usage, --help, --collect-only: pytest has spoken
    names = Names()
    command = ["-m", "heavy", "--collect-only", "-qq", "-n", "0", "tests"]
    incomplete = int(pytest.main(command, plugins=[names])) or int(bool(names.skipped))
    if incomplete:
        print(f"not all heavy tests could be collected, so {RESULTS.name} keeps its rows: mend what pytest names above")
        return incomplete
    # A test that is gone takes its row along.
    rows = [row for row in read(RESULTS) if row["test"] in names.names]
    write(RESULTS, rows)
    lines = lacking(names.names, rows)
    print("\n".join([f"{len(names.names) - len(lines)} of {len(names.names)} heavy tests have passed", *lines]))
    return 1 if lines or status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
