"""The rows of a run: kept in a file as they come, shown as tables at the end."""

from __future__ import annotations

import json
import os
import platform
from collections import deque
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import cast_kernels
from cast_kernels.gpu.rows import Row, cells, notes, reason

#: Where a run leaves its rows and environment unless told otherwise, beside what --benchmark-json keeps.
RESULTS = Path("runs/benchmarks.json")

#: Packages whose versions a reader must know.
PACKAGES = ("triton", "xformers", "flash-attn", "openvino", "onnxruntime", "onnx", "onnxscript", "numpy")


class Report:
    """Rows of all groups, in the order in which they were measured.

    Args:
        path: where they are kept; None for nowhere.
        command: that measures them.
    """

    def __init__(self, path: Path | None, command: str = "") -> None:
        self.path, self.command = path, command
        self.groups: dict[str, dict[str, Row]] = {}
        self.ceilings: dict[str, float] = {}
        self.about_device: dict[str, Any] = {}
        self.broken = ""

    def add(self, group: str, name: str, row: Row) -> None:
        """Take a row and write the file anew: a fault or a kill loses nothing that is known."""
        self.groups.setdefault(group, {})[name] = row
        self.save()

    def known(self, group: str) -> dict[str, Row]:
        return self.groups.get(group, {})

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        found = {
            "environment": environment(self.command), "device": self.about_device, "ceilings": self.ceilings,
            "broken": self.broken, "groups": self.groups,
        }  # fmt: skip
        part.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(part, self.path)

    def load(self) -> None:
        """Take the rows that the file holds, but not those for which there was no time; nothing if there is no file."""
        if self.path is None or not self.path.exists():
            return
        found = json.loads(self.path.read_text())
        self.ceilings, self.about_device = found["ceilings"], found["device"]
        for title, rows in found["groups"].items():
            self.groups[title] = {
                n: row for n, row in rows.items() if not row.get("missing", "").startswith("not begun")
            }

    def show(self) -> None:
        """Print every group, and where its rows are."""
        self.save()
        console = Console(width=max(200, Console().width))
        console.print()
        for title, rows in self.groups.items():
            console.print(render(title, rows))
            for why in dict.fromkeys(filter(None, map(reason, rows.values()))):
                names = ", ".join(name for name, row in rows.items() if reason(row) == why)
                console.print(f"{names}: {why}", markup=False)
        for about in (self.about_device, environment(self.command)):
            if about:
                console.print(", ".join(f"{k} {v}" for k, v in about.items()), markup=False)
        if self.ceilings:
            rates = ", ".join(
                f"{name.removesuffix('_per_s')} {rate / 1e9:.0f} G/s" for name, rate in self.ceilings.items()
            )
            console.print(f"measured ceilings: {rates}", markup=False)
        for note in notes(self.groups):
            console.print(note, markup=False)
        if self.broken:
            console.print(f"broken: {self.broken}", markup=False)
        console.print(f"rows and all samples: {self.path}", markup=False, soft_wrap=True)


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
    table = Table(title=title, title_justify="left")
    headers, lines = cells(rows)
    table.add_column(headers[0], no_wrap=True)
    for header in headers[1:]:
        table.add_column(header, justify="right")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    return table


_ticks: deque[float] = deque()


def recorded_time() -> float:
    """pytest-benchmark's timer for rows that were timed already: the samples given to :func:`replay`, one by one.

    So --benchmark-json keeps the interleaved samples instead of a second measurement of each variant alone.
    """
    return _ticks.popleft() if _ticks else 0.0


def replay(benchmark: Any, row: Row) -> None:
    """Hand a row and its samples to pytest-benchmark. Its test must run under `recorded_time` as the timer."""
    benchmark.extra_info.update({key: value for key, value in row.items() if not key.endswith("all_ms")})
    if "all_ms" not in row:
        return
    _ticks.clear()
    for ms in row["all_ms"]:
        _ticks.extend((0.0, ms / 1e3))
    benchmark.pedantic(lambda: None, rounds=len(row["all_ms"]))
