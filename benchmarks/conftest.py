"""The table at the end of a benchmark run, and its JSON."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

#: Where every run leaves its rows and environment, beside what --benchmark-json keeps.
RESULTS = Path("runs/benchmarks.json")


class Report:
    """Rows of all groups, in the order in which they were measured."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, dict[str, Any]]] = {}

    def add(self, group: str, name: str, row: dict[str, Any]) -> None:
        self.groups.setdefault(group, {})[name] = row


def environment() -> dict[str, Any]:
    """What a reader must know to judge the figures."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": model,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "pytest benchmarks/ --benchmark-only",
    }


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEY] = Report()


_KEY = pytest.StashKey[Report]()


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Report:
    return request.config.stash[_KEY]


def pytest_terminal_summary(config: pytest.Config) -> None:
    groups = config.stash[_KEY].groups
    if not groups:
        return
    about = environment()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"environment": about, "groups": groups}, indent=1) + "\n")
    console = Console(width=140)
    console.print()
    for title, rows in groups.items():
        console.print(render(title, rows))
    console.print(", ".join(f"{k} {v}" for k, v in about.items()))
    console.print("inexact: a gradient's error against fp64 is more than twice that of the first row, so no speed-up")
    console.print(f"samples interleaved, medians over samples with quiet neighbours; rows kept in {RESULTS}")


def render(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    """One group as a table."""
    ceiling = next(iter(rows.values()))["ceiling_gflops"]
    table = Table(title=f"{title} (measured FMA ceiling {ceiling:.0f} GFLOP/s)", title_justify="left")
    table.add_column("variant")
    headers = (
        "median ms",
        "min ms",
        "speed-up",
        "GFLOP/s",
        "of ceiling",
        "kept MiB",
        "rms error",
        "worst / eager",
        "clean",
    )
    for header in headers:
        table.add_column(header, justify="right")
    for name, row in rows.items():
        kept = "" if row["kept_mib"] is None else f"{row['kept_mib']:.1f}"
        table.add_row(
            name, f"{row['median_ms']:.1f}", f"{row['min_ms']:.1f}",
            f"{row['speedup']:.2f}x" if row["speedup"] else "inexact", f"{row['gflops']:.0f}",
            f"{100 * row['of_ceiling']:.0f} %", kept, f"{row['error']:.1e}", f"{row['worst_error_over_eager']:.2f}",
            f"{row['clean']:.0f}/{row['samples']:.0f}",
        )  # fmt: skip
    return table
