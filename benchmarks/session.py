"""One run of the benchmarks: its machine, selected rows, remaining minutes, and results."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from compare import compare
from groups import Group, Row, Sizes
from measure import CpuMachine
from report import ENDED, Report

from cast_kernels import _native
from cast_kernels.gpu.ceilings import ceilings
from cast_kernels.gpu.machine import CudaMachine, Machine, NoGPUError, UnusableError
from cast_kernels.gpu.rows import NOT_BEGUN

#: A group does not start with fewer seconds left of `--minutes`.
LEAST_SECONDS = 10.0


def device_of(asked: str) -> str:
    """The device for `--device`; `auto` is the GPU if there is one."""
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() and torch.version.hip is None else "cpu"


@dataclass
class Session:
    """Shared by the tests of a run.

    Args:
        device: "cpu" or "cuda", the groups' device.
        sizes: of the problems.
        minutes: for all groups; infinite by default.
        report: collects the rows.
        resume: whether rows in the report's file are not measured again.
    """

    device: str
    sizes: Sizes
    minutes: float
    report: Report
    resume: bool = False
    selected: dict[str, list[str]] = field(default_factory=dict)  # by group's name, in the order of its table
    broken: str = ""
    _began: float = field(default_factory=time.monotonic)
    _measured: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @cached_property
    def machine(self) -> Machine:
        """The machine. Raises NoGPUError if the device is cuda and there is no GPU."""
        return CudaMachine() if self.device == "cuda" else CpuMachine()  # type: ignore[return-value]

    def seconds_left(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self._began)

    def select(self, rows: Sequence[Row]) -> None:
        """Measure only these rows, each beside the baseline of its group."""
        for group in {row.group.name: row.group for row in rows}.values():
            asked = {row.name for row in rows if row.group.name == group.name} | {group.rows[0]}
            self.selected[group.name] = [name for name in group.rows if name in asked]

    def row(self, row: Row) -> dict[str, Any]:
        """The row. The first row of a group measures the whole group."""
        group = row.group
        if group.name not in self._measured:
            self._measured[group.name] = self._measure(group)
        return self._measured[group.name][row.name]

    def gpu(self) -> str:
        """The GPU's name; "" if no GPU is measured, or none is here."""
        try:
            return str(self.machine.describe()["name"]) if self.device == "cuda" else ""
        except NoGPUError:
            return ""

    def _measure(self, group: Group) -> dict[str, dict[str, Any]]:
        """Every selected row. In a resumed run, rows that the file lacks are measured beside the baseline."""
        known = dict(self.report.known(group.title)) if self.resume else {}
        names = [name for name in self.selected[group.name] if name not in known]
        if known and names:
            names = [group.rows[0], *(name for name in names if name != group.rows[0])]
        return known | (self._measure_now(group, names, known) if names else {})

    def _measure_now(self, group: Group, names: list[str], known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        fresh = [
            name for name in names if name not in known
        ]  # without a known baseline, which no failure below may lose
        if self.broken:
            return {name: {"failed": self.broken} for name in fresh}
        if self.seconds_left() < LEAST_SECONDS:
            late = {name: {"missing": f"{NOT_BEGUN}: the {self.minutes:g} minutes were over"} for name in fresh}
            for name, row in late.items():
                self.report.add(group.title, name, row)
            return late
        try:
            self._measure_ceilings()
            work = group.work(self.machine)
            work.seconds = work.seconds if self.sizes.name == "paper" else 0.0
            self.report.begin(group.title, fresh)
            rows = compare(
                self.machine, work, names, self.seconds_left(), self.device,
                lambda name, row: self.report.add(group.title, name, row) if name in fresh else None,
            )  # fmt: skip
            self._rate(rows, work.flops(), work.bytes, str(work.kind.compute))
        except NoGPUError as error:
            self.broken = f"{error}; --device cpu measures on the processor"
            return {name: {"failed": self.broken} for name in fresh}
        except UnusableError as error:
            self.broken = self.report.broken = str(error)
            begun, ended = self.report.known(group.title), {"failed": ENDED}
            rows = {name: begun.get(name, ended) for name in fresh}
            rows = {name: {"failed": self.broken} if row == ended else row for name, row in rows.items()}
        except Exception as error:  # raised by the exact results
            failed = {"failed": f"{type(error).__name__}: {error}"}
            self._note_fault()
            rows = {name: {**self.report.known(group.title).get(name, {}), **failed} for name in fresh}
        for name, found in rows.items():
            if not self.broken or name in self.report.known(group.title):  # otherwise a resumed run measures it
                self.report.add(group.title, name, found)
        self.report.save()
        if not self.broken:
            self.machine.free()  # frees the group's memory before the next one needs some
        return rows

    def _note_fault(self) -> None:
        try:
            self.machine.synchronise()
        except Exception as error:
            self.broken = f"the GPU can be used no more ({error}); what follows was not run"
            self.report.broken = self.broken

    def _measure_ceilings(self) -> None:
        """Measure them once, before the first group."""
        if self.report.ceilings or self.report.about_device:
            return
        if self.device == "cuda":
            self.report.about_device = self.machine.describe()
            small = {"copy_bytes": 1 << 10, "gemm": 16} if self.sizes.name == "small" else {}
            found = dict(ceilings(self.machine, 10, **small))
            self.report.ceilings = {} if self.machine.stand_in else found
        elif _native.CORE is not None:
            # The best of several, because another process may take a core for a moment.
            rates = [_native.CORE.measure_fma_ceiling(torch.get_num_threads(), 0.2) for _ in range(3)]
            self.report.ceilings = {"fma_flops_per_s": 1e9 * max(rates)}

    def _rate(self, rows: dict[str, dict[str, Any]], flops: int, least_bytes: int, compute: str) -> None:
        """Write each row's rate and its shares of the ceilings. On a GPU use the graph's time: it has no gaps."""
        found = self.report.ceilings
        gemm = "gemm_fp32_flops_per_s" if compute == "torch.float32" else "gemm_flops_per_s"
        ceiling = found.get(gemm)
        # The rate of float32 multiply-adds is no bound for products of bfloat16 pairs.
        if compute == "torch.float32" or not _native.ISA.endswith("bf16"):
            ceiling = found.get("fma_flops_per_s", ceiling)
        for row in rows.values():
            ms = row.get("graph_median_ms", row.get("median_ms"))
            if ms is None or not flops:
                continue
            row["gflops"] = flops / ms / 1e6
            if ceiling:
                row["of_ceiling"] = 1e3 * flops / ms / ceiling
            if least_bytes and "copy_bytes_per_s" in found:
                row["of_copy"] = 1e3 * least_bytes / ms / found["copy_bytes_per_s"]
