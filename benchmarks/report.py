"""The tables at the end of a benchmark run, and their JSON."""

from __future__ import annotations

import json
import platform
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import cast_kernels

#: Where every run leaves its rows and environment, beside what --benchmark-json keeps.
RESULTS = Path("runs/benchmarks.json")

#: Packages whose versions a reader must know.
PACKAGES = ("openvino", "onnxruntime", "onnx", "onnxscript", "numpy")

Row = dict[str, Any]

#: Header -> the cell of a row, or "" where the row has no such figure. A column without cells is left out.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "median ms": lambda row: _number(row, "median_ms", "{:.1f}"),
    "min ms": lambda row: _number(row, "min_ms", "{:.1f}"),
    "clips/s": lambda row: _number(row, "clips_per_second", "{:.1f}"),
    "speed-up": lambda row: _number(row, "speedup", "{:.2f}x") or ("inexact" if "correct" in row else ""),
    "GFLOP/s": lambda row: _number(row, "gflops", "{:.0f}"),
    "of ceiling": lambda row: _number(row, "of_ceiling", "{:.0%}"),
    "kept MiB": lambda row: _number(row, "kept_mib", "{:.1f}"),
    "rms error": lambda row: _number(row, "error", "{:.1e}"),
    "worst / eager": lambda row: _number(row, "worst_error_over_eager", "{:.2f}"),
    "clean": lambda row: f"{row['clean']}/{row['samples']}" if "samples" in row else "",
    "peak MiB": lambda row: _number(row, "peak_mib", "{:.0f}"),
    "of first row": lambda row: _number(row, "peak_share", "{:.0%}"),
    "before the first step MiB": lambda row: _number(row, "before_mib", "{:.0f}"),
    "peak above that MiB": lambda row: _number(row, "above_mib", "{:.0f}"),
    "of first row's": lambda row: _number(row, "above_share", "{:.0%}"),
}


def _number(row: Row, key: str, form: str) -> str:
    return "" if row.get(key) is None else form.format(row[key])


class Report:
    """Rows of all groups, in the order in which they were measured."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, Row]] = {}

    def add(self, group: str, name: str, row: Row) -> None:
        self.groups.setdefault(group, {})[name] = row

    def show(self, command: str) -> None:
        """Print every group and write all of them to :data:`RESULTS`."""
        about = environment(command)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({"environment": about, "groups": self.groups}, indent=1) + "\n")
        console = Console(width=160)
        console.print()
        for title, rows in self.groups.items():
            console.print(render(title, rows))
            for name, row in rows.items():
                if "missing" in row:
                    console.print(f"{name}: {row['missing']}", markup=False)
        console.print(", ".join(f"{k} {v}" for k, v in about.items()), markup=False)
        console.print("inexact: an error against fp64 is more than twice that of the first row, so no speed-up")
        console.print("clean: samples with quiet neighbours, of all; figures are over clean ones if there are three")
        console.print(f"samples of a group are interleaved; rows kept in {RESULTS}")


def environment(command: str) -> dict[str, Any]:
    """What a reader must know to judge the figures."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": model,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cast_kernels": cast_kernels.__version__,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def render(title: str, rows: dict[str, Row]) -> Table:
    """One group as a table."""
    ceiling = next((row["ceiling_gflops"] for row in rows.values() if "ceiling_gflops" in row), None)
    if ceiling is not None:
        title = f"{title} (measured fp32 FMA ceiling {ceiling:.0f} GFLOP/s)"
    table = Table(title=title, title_justify="left")
    table.add_column("variant")
    shown = {header: cell for header, cell in COLUMNS.items() if any(cell(row) for row in rows.values())}
    for header in shown:
        table.add_column(header, justify="right")
    for name, row in rows.items():
        cells = [cell(row) for cell in shown.values()]
        table.add_row(name, *(["missing", *cells[1:]] if "missing" in row and cells else cells))
    return table


_ticks: deque[float] = deque()


def recorded_time() -> float:
    """pytest-benchmark's timer for rows that were timed already: the samples given to :func:`replay`, one by one.

    So --benchmark-json keeps the interleaved samples instead of a second measurement of each variant alone.
    """
    return _ticks.popleft() if _ticks else 0.0


def replay(benchmark: Any, row: Row) -> None:
    """Hand a row and its samples to pytest-benchmark. Its test must run under `recorded_time` as the timer."""
    benchmark.extra_info.update({key: value for key, value in row.items() if key != "all_ms"})
    if "all_ms" not in row:
        return
    _ticks.clear()
    for ms in row["all_ms"]:
        _ticks.extend((0.0, ms / 1e3))
    benchmark.pedantic(lambda: None, rounds=len(row["all_ms"]))
