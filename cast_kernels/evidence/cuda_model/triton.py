"""Triton's launches by the terms that the model of the CUDA C++ kernels adds: intake, waits, spills, gaps of launches.

What a program executes was counted by `cast-kernels predict` and stands in `benchmarks/predictions`; what the compiler
spilled stands in `benchmarks/evidence/compile.json`. With the added terms left out, the times are those predictions'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ptx_emulator.predict.devices import Device

from cast_kernels.evidence.cuda_model.arithmetic import USUAL, Assumptions, epilogue_cycles
from cast_kernels.evidence.cuda_model.attention import COPY
from cast_kernels.evidence.cuda_model.problem import Sizes
from cast_kernels.triton import tiles

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
#: Kernels whose programs hold a row. What they execute between their products, nothing overlaps.
ROW_KERNELS = ("project", "exchange", "exchange_backward", "project_backward")
#: Of `exchange`'s spill instructions a program of one direction meets about half (docs/triton.md).
_MET = {"exchange": 0.5}
#: What the model adds to a committed prediction.
TERMS = ("intake", "waits", "spills", "gaps")
#: Streams' element -> the kind of the committed predictions.
_KINDS = {2: "bf16", 4: "amp"}


@dataclass(frozen=True)
class TritonTime:
    """One launch of Triton's, microseconds."""

    name: str
    programs: int
    committed: float  # as it was predicted: all overlaps, nothing spills, no gap
    parts: Mapping[str, float]  # each resource alone
    waits: float  # of the busiest multiprocessor: starts, and what is executed between products
    spills: float  # of L2, for what does not stay in L1
    sm: float  # the busiest multiprocessor's
    us: float

    @property
    def bound_by(self) -> str:
        """What takes the time: DRAM or L2 where they take longest, else the busiest part of a multiprocessor."""
        chip = {"l2": self.parts["l2"] + self.spills, "dram": self.parts["dram"]}
        most = max(chip, key=lambda name: chip[name])
        if chip[most] >= self.sm:
            return most
        inner = max((name for name in self.parts if name not in chip), key=lambda name: self.parts[name])
        return inner if self.parts[inner] > self.waits else "waits"


def launches(
    device: Device, sizes: Sizes, phase: str, terms: tuple[str, ...] = TERMS, by: Assumptions = USUAL
) -> list[TritonTime]:
    """Each launch of a phase at the paper's size.

    Args:
        device: that was predicted for.
        sizes: of the call.
        phase: "forward" or "backward".
        terms: of :data:`TERMS` that are added.
        by: the model's constants.

    Raises:
        FileNotFoundError: this is no checkout.
        ValueError: the committed predictions have no such batch.
    """
    entry = _committed(device.name, _KINDS[sizes.stream_bytes], sizes.recompute)
    for one in entry["batches"]:
        if one["batch"] == sizes.batch:
            return [_launch(found, device, sizes, phase, terms, by) for found in one["launches"][phase]]
    known = ", ".join(str(one["batch"]) for one in entry["batches"])
    raise ValueError(f"no prediction of Triton's kernels for {sizes.batch} clips on {device.name}; there are {known}")


@cache
def _committed(name: str, kind: str, recompute: str) -> Any:
    path = BENCHMARKS / "predictions" / kind / recompute / f"{name.lower()}.json"
    return json.loads(path.read_text())["devices"][name]


def _launch(
    found: Mapping[str, Any], device: Device, sizes: Sizes, phase: str, terms: tuple[str, ...], by: Assumptions
) -> TritonTime:
    kernel, programs = found["kernel"], found["grid"][0] * found["grid"][1] * found["grid"][2]
    parts = {name: found[name] for name in ("tensor", "shared", "issue", "l2", "dram")}
    rounds, per_sm = -(-programs // device.target.processors), max(found["ctas_per_sm"], 1)
    us = 1e6 / device.clock
    if "intake" in terms:
        moved = found["l2"] * 1e-6 * device.l2 / programs  # bytes of a program; stores are among them
        parts["intake"] = us * rounds * moved / by.intake
    wait, spilled, gap = 0.0, 0.0, 0.0
    if "waits" in terms:
        wait = us * by.start
        if kernel in ROW_KERNELS:
            between = _between(found, device, programs, rounds, by)
            wait += us * epilogue_cycles(between, warps(kernel, device, sizes) / by.schedulers, by)
    if "spills" in terms:
        bytes_each = spill_bytes(kernel, device.target.name, sizes.recompute, sizes.batch == 1, phase)
        spilled = 1e6 * programs * bytes_each / device.l2
    if "gaps" in terms:
        gap = 1e6 * by.gap
    main = max(parts["tensor"], parts["shared"], parts.get("intake", 0.0)) / rounds
    busy = max(rounds * main + wait, -(-rounds // per_sm) * (main + wait), parts["issue"])
    return TritonTime(
        kernel, programs, found["us"], parts, -(-rounds // per_sm) * wait, spilled, busy,
        max(busy, parts["l2"] + spilled, parts["dram"]) + gap,
    )  # fmt: skip


def warps(kernel: str, device: Device, sizes: Sizes) -> int:
    """Of a row kernel's program, by the architecture's table."""
    name = "project_wide" if kernel == "project" and sizes.cast else kernel
    return tiles.find(device.target.name, name, 16, sizes.d, sizes.all_rows).warps


def _between(found: Mapping[str, Any], device: Device, programs: int, rounds: int, by: Assumptions) -> float:
    """Warp instructions that a program executes between its products: all but what copies operands.

    Every program of the busiest multiprocessor counts as an equal share of what that executes.
    """
    executed = found["issue"] * 1e-6 * device.clock / rounds * by.schedulers
    copies = found["l2"] * 1e-6 * device.l2 / programs / 512 * COPY
    return max(executed - copies, 0.0)


def spill_bytes(kernel: str, target: str, recompute: str, few: bool, phase: str) -> float:
    """Bytes that one program spills to L2: what its instructions move, but for the share of its stack that L1 holds.

    The kernels were compiled for bf16 with one clip and with six; autocast and more clips take these figures too.
    """
    case = f"B{1 if few else 6} T8 N196 D768 d384 h12, t2s+s2t time/space, forward, backward, recompute {recompute}"
    again = phase == "backward" and kernel == "project"
    for row in _compiled():
        asked = (row["target"], row["dtype"], row["kernel"]) == (target, "bf16", kernel) and case in row["cases"]
        if asked and kernel in ROW_KERNELS and again == ("FROM_Z" in row["tile"]):
            return _spilled(row) * _MET.get(kernel, 1.0)
    return 0.0


def _spilled(row: Mapping[str, Any]) -> float:
    lanes = int(row["tile"].rsplit("warps=", 1)[1]) * 32
    used = row["resources"]
    stack = used["stack_bytes"] * lanes
    if stack == 0:
        return 0.0
    left = USUAL.local / used["ctas"] - used["shared_bytes"]
    return float(used["spills"] * lanes * 4 * max(0.0, 1 - left / stack))


@cache
def _compiled() -> Any:
    return json.loads((BENCHMARKS / "evidence/compile.json").read_text())
