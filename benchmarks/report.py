"""The rows of a run: written to a file after each one, shown as tables at the end."""

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

#: Default file for a run's rows and environment, in addition to --benchmark-json.
RESULTS = Path("runs/benchmarks.json")

#: A row's text from the start of its group until its measurement ends.
ENDED = "the run ended while this row's group was measured"

#: Characters for the widest table. A terminal scrolls or folds; nothing is cut off.
_WIDEST = 400

#: Packages whose versions a reader needs.
PACKAGES = ("triton", "xformers", "flash-attn", "openvino", "onnxruntime", "onnx", "onnxscript", "numpy")


class RowsError(ValueError):
    """The file of rows cannot be used; the message gives the reason and a remedy."""


class Report:
    """Rows of all groups of one device and size, in the order of measurement.

    Args:
        path: their file; None for no file.
        command: the measuring command.
        device, sizes: those of the rows.

    Raises:
        RowsError: a file cannot have this path.
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
        """Add a row and rewrite the file, so that a fault or a kill loses no known row."""
        self.groups.setdefault(group, {})[name] = row
        self.save()

    def begin(self, group: str, names: Iterable[str]) -> None:
        """Mark these rows as in progress, in case the process ends before their measurement does."""
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
        """Load the file's rows, without those that had no time; nothing if there is no file.

        Args:
            gpu: name of the present GPU, "" if that does not matter.

        Raises:
            RowsError: the file has other contents, or rows of another device, GPU or size.
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
        """Print every group, and the path of its rows."""
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
    """Facts that a reader needs to judge the figures."""
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
    """The processor's name, with family and model if /proc/cpuinfo has them: in a virtual machine the name may be only
    the brand.
    """
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
    """One group as a table. Each column is as wide as its longest cell, so that no figure is cut off."""
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
    """pytest-benchmark's timer for rows with earlier samples: it returns the samples of :func:`replay`, one by one.

    So --benchmark-json has the interleaved samples, without a second measurement of each variant alone.
    """
    return _ticks.popleft() if _ticks else 0.0


def replay(benchmark: Any, row: Row) -> None:
    """Pass a row and its samples to pytest-benchmark. The test's timer must be `recorded_time`."""
    benchmark.extra_info.update({key: value for key, value in row.items() if not key.endswith("all_ms")})
    if "all_ms" not in row:
        return
    _ticks.clear()
    for ms in row["all_ms"]:
        _ticks.extend((0.0, ms / 1e3))
    benchmark.pedantic(lambda: None, rounds=len(row["all_ms"]))
