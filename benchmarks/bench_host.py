"""The host's time for launches: B-CAST and a training step, relative to an older commit in one interleaved run.

    pytest benchmarks/ --benchmark-only -k host

Any GPU is hidden: our launches are counted, not made (`host_worker.py`). Machines differ, so the older commit's tree is
taken from git's history and timed alternately with this one. Eager's time is an estimate: its number of operators times
the time of one on tensors of size one, plus its launches times :data:`LAUNCH_US`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from host_worker import WORK
from report import recorded_time, replay
from rich.console import Console
from rich.table import Table

CPU_ONLY = True
ROOT = Path(__file__).parent.parent
#: The commit before plans. The ratios are relative to it.
BASE = "7dd7dae"
#: Time of a launch by CUDA's driver, which no recorder needs. A common figure, not measured here.
LAUNCH_US = 2.5
#: Interleaved samples of each tree, and steps in a sample.
SAMPLES = 7
STEPS = {"B-CAST forward": 800, "B-CAST forward, AMP": 800, "CAST-B training step, AMP": 9}
#: These settings keep freed memory for the next step, as PyTorch's allocator on a GPU does.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


class Worker:
    """A process that times one tree."""

    def __init__(self, tree: Path) -> None:
        path = os.pathsep.join(map(str, (tree, tree / "tools", ROOT / "benchmarks")))
        cache = Path(tempfile.gettempdir()) / "cast-kernels-host"
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "host_worker.py"), str(cache)], cwd=tree,
            env=os.environ | _MALLOC | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, line: str) -> dict[str, float]:
        """The worker's answer.

        Raises:
            RuntimeError: it ended without one; its output is above.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker in {self.process.args!r} ended at {line!r}")
        found: dict[str, float] = json.loads(answer)
        return found

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def base_tree(folder: Path) -> str:
    """Put the tree of :data:`BASE` into the folder -> "", or the reason of a failure."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", BASE], capture_output=True, check=False)
    if archive.returncode:
        return f"{BASE} is not in git's history here: {archive.stderr.decode().strip().splitlines()[-1]}"
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return ""


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Worker, Worker | None, str]]:
    """This tree's worker, the base's, and the reason if there is no base."""
    folder = tmp_path_factory.mktemp("base")
    missing = base_tree(folder)
    ours, base = Worker(ROOT), None if missing else Worker(folder)
    yield ours, base, missing
    for worker in (ours, base):
        if worker is not None:
            worker.stop()


@pytest.fixture(scope="module")
def rows(pytestconfig: pytest.Config) -> Iterator[list[dict[str, Any]]]:
    """The measured rows; printed at the end of the module."""
    found: list[dict[str, Any]] = []
    yield found
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        show(found)


def measure(work: str, ours: Callable[[str], dict[str, float]], base: Callable[[str], dict[str, float]] | None,
            eager: dict[str, float]) -> dict[str, Any]:  # fmt: skip
    """A row: the fastest and the slowest sample of this tree, the median of the paired ratios and their range."""
    line = f"{work} {STEPS.get(work, 200)}"
    pairs = []
    for _ in range(SAMPLES):
        mine = ours(line)
        pairs.append((mine, base(line) if base else None))
    times = [mine["us"] for mine, _ in pairs]
    row: dict[str, Any] = {
        "work": work, "us": statistics.median(times), "lowest_us": min(times), "highest_us": max(times),
        "launches": pairs[-1][0]["launches"], "recorder_us": min(mine["recorder_us"] for mine, _ in pairs),
        "eager_us": eager["operators"] * eager["operator_us"] + eager["launches"] * LAUNCH_US,
        "eager": eager, "all_ms": [us / 1e3 for us in times],
    }  # fmt: skip
    ratios = [mine["us"] / other["us"] for mine, other in pairs if other]
    if ratios:
        row |= {"ratio": statistics.median(ratios), "ratios": ratios}
        row["base_us"] = statistics.median(other["us"] for _, other in pairs if other)
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"host: launches counted, not made; {SAMPLES} interleaved samples; ratio to {BASE}")
    for column in ("work", "us", "from", "to", "launches", f"with {LAUNCH_US} us a launch", BASE, "ratio", "from",
                   "to", "eager, estimated"):  # fmt: skip
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in rows:
        ratios = row.get("ratios")
        compared = [row["missing"], "", "", ""]
        if ratios:
            compared = [f"{row['base_us']:.0f}", *(f"{x:.2f}" for x in (row["ratio"], min(ratios), max(ratios)))]
        table.add_row(
            row["work"], *(f"{row[key]:.0f}" for key in ("us", "lowest_us", "highest_us", "launches")),
            f"{row['us'] + row['launches'] * LAUNCH_US:.0f}", *compared, f"{row['eager_us']:.0f}",
        )  # fmt: skip
    console = Console(width=max(170, Console().width))
    console.print()
    console.print(table)
    if rows:
        recorder, operator = min(row["recorder_us"] for row in rows), rows[0]["eager"]["operator_us"]
        text = f"A recorded launch costs {recorder:.2f} us, in the times. Eager: operators at {operator:.2f} us on"
        text += f" tensors of size one, and {LAUNCH_US} us a launch. A GPU adds its device guard, 1 to 2 us a call."
        console.print(text, highlight=False)


@pytest.mark.benchmark(timer=recorded_time, group="host")
@pytest.mark.parametrize("work", WORK)
def test_host(work: str, benchmark: Any, trees: Any, rows: list[dict[str, Any]]) -> None:
    ours, base, missing = trees
    row = measure(work, ours.ask, base.ask if base else None, ours.ask(f"eager {work}")) | {"missing": missing}
    rows.append(row)
    replay(benchmark, row)
