"""The rows of a run: kept in a file as they come, shown as tables at the end."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import cast_kernels
from cast_kernels.gpu import order
from cast_kernels.gpu.rows import Row, cells, not_begun, notes, reason

#: Where a run leaves its rows and environment unless told otherwise, beside what --benchmark-json keeps.
RESULTS = Path("runs/benchmarks.json")

#: What stands in a row from the beginning of its group to its end.
ENDED = "the run ended while this row's group was measured"

#: Characters that the widest table may take: a terminal scrolls or folds, but nothing is cut off.
_WIDEST = 400

#: Packages whose versions a reader must know.
PACKAGES = ("triton", "xformers", "flash-attn", "openvino", "onnxruntime", "onnx", "onnxscript", "numpy")


class RowsError(ValueError):
    """The file of rows cannot be used; the message says why and what to do."""


class Report:
    """Rows of all groups, in the order in which they were measured: of one device at one size.

    Args:
        path: where they are kept; None for nowhere.
        command: that measures them.
        device, sizes: that they are of.

    Raises:
        RowsError: the path cannot be a file.
    """

    def __init__(self, path: Path | None, command: str = "", device: str = "", sizes: str = "") -> None:
        self.path, self.command = path, command
        self.place = {"device": device, "sizes": sizes}
        if path is not None and (path.is_dir() or any(p.exists() and not p.is_dir() for p in path.parents)):
            what = "is a folder" if path.is_dir() else "would lie in a file"
            raise RowsError(f"{path} {what}; --rows takes the name of a file, which is made, such as {RESULTS}")
        self.groups: dict[str, dict[str, Row]] = {}
        self.ceilings: dict[str, float] = {}
        self.about_device: dict[str, Any] = {}
        self.broken = ""

    def add(self, group: str, name: str, row: Row) -> None:
        """Take a row and write the file anew: a fault or a kill loses nothing that is known."""
        self.groups.setdefault(group, {})[name] = row
        self.save()

    def begin(self, group: str, names: Iterable[str]) -> None:
        """Say that these rows are measured now, in case nothing more can be said of them."""
        self.groups.setdefault(group, {}).update({name: {"failed": ENDED} for name in names})
        self.save()

    def known(self, group: str) -> dict[str, Row]:
        return self.groups.get(group, {})

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        found = {
            "environment": environment(self.command), "place": self.place, "device": self.about_device,
            "ceilings": self.ceilings, "broken": self.broken, "groups": self.groups,
        }  # fmt: skip
        part.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(part, self.path)

    def load(self, gpu: str = "") -> None:
        """Take the rows that the file holds, but not those for which there was no time; nothing if there is no file.

        Args:
            gpu: name of the one that is here, "" if that does not matter.

        Raises:
            RowsError: the file holds something else, or rows of another device, GPU or size.
        """
        if self.path is None or not self.path.exists():
            return
        anew = "take another file by --rows, or leave out --resume, which writes it anew"
        try:
            found = json.loads(self.path.read_text())
            place, about = dict(found["place"]), dict(found["device"])
            groups = {str(title): {n: dict(row) for n, row in rows.items()} for title, rows in found["groups"].items()}
            ceilings = dict(found["ceilings"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise RowsError(f"--resume: {self.path} holds no rows of these benchmarks ({why}); {anew}") from None
        here, there = {**self.place, "gpu": gpu}, {**place, "gpu": about.get("name", "") if gpu else ""}
        if here != there and groups:
            told = [", ".join(f"{k} {v}" for k, v in where.items() if v) for where in (there, here)]
            raise RowsError(f"--resume: {self.path} holds rows of {told[0]}, and this run is of {told[1]}; {anew}")
        self.ceilings, self.about_device = ceilings, about
        for title, rows in groups.items():
            self.groups[title] = {n: row for n, row in rows.items() if not not_begun(row)}

    def show(self) -> None:
        """Print every group, and where its rows are."""
        self.save()
        console = Console(width=max(_WIDEST, Console().width))
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
        if self.place["device"] == "cuda":
            console.print(order.line(self.groups), markup=False, soft_wrap=True)
        if self.broken:
            console.print(f"broken: {self.broken}", markup=False)
        console.print(f"rows and all samples: {self.path}", markup=False, soft_wrap=True)


def environment(command: str) -> dict[str, Any]:
    """What a reader must know to judge the figures."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cast_kernels": cast_kernels.__version__,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }


def processor() -> str:
    """Its name; family and model too where /proc/cpuinfo has them, since a virtual machine's name may say no more
    than the brand."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    if not {"model name", "cpu family", "model"} <= facts.keys():
        return platform.processor()
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def render(title: str, rows: dict[str, Row]) -> Table:
    """One group as a table, each column as wide as its longest cell: a figure that is cut off is none."""
    table = Table(title=title, title_justify="left")
    headers, lines = cells(rows)
    for number, header in enumerate(headers):
        width = max(len(line[number]) for line in lines)
        folded = "\n".join(textwrap.wrap(header, max(width, *map(len, header.split()), 1)))
        table.add_column(folded, no_wrap=True, min_width=width, justify="right" if number else "left")
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
