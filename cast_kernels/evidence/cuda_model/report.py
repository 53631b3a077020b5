"""`cast-kernels predict --cuda`: the CUDA C++ kernels by their model, beside Triton's by the same one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ptx_emulator.predict.devices import Device, device

from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.cuda_model import arithmetic, design, tables, triton
from cast_kernels.evidence.cuda_model.arithmetic import USUAL, Assumptions, Launch
from cast_kernels.evidence.cuda_model.launches import PHASES
from cast_kernels.evidence.cuda_model.problem import Choice, Sizes, useful
from cast_kernels.evidence.model import UNCERTAINTY
from cast_kernels.evidence.prediction_report import constant

LABEL = "predicted by arithmetic: no CUDA C++ kernel of ours has run on a GPU, and none of Triton's has been timed"
#: GPUs that the kernels are designed for: they need `wgmma`.
DEVICES = ("H100", "H200")
#: Kind -> bytes of an element of the streams, and of parameters.
KINDS = {"bf16": 2, "amp": 4}
#: The decompositions that the totals are of: as it is designed, with three changes, these with 128 rows, and as built.
WAYS = {
    "designed": Choice(),
    "changed": Choice(split_tail=True, table_bytes=2, queries=128),
    "staggered": Choice(128, 2, staggered=True, split_tail=True, table_bytes=2, queries=128),
    "built": Choice(split_tail=True, table_bytes=2, built=True),
}
#: Those whose launches are shown.
SHOWN = ("designed", "built")
DESIGNED, STAGGERED, BUILT = WAYS["designed"], WAYS["staggered"], WAYS["built"]
CHOICES = tuple(
    Choice(rows, cluster, inside)
    for inside in ((), ("t2s",), ("t2s", "s2t")) for rows in (64, 128) for cluster in (1, 2, 4)
)  # fmt: skip
#: What else could be, one thing at a time: (what, the choice, the model's constants).
CHANGES: tuple[tuple[str, Choice, Assumptions], ...] = (
    ("as designed", DESIGNED, USUAL),
    ("rows that fill no whole round: columns split", replace(DESIGNED, split_tail=True), USUAL),
    ("position tables in bf16", replace(DESIGNED, table_bytes=2), USUAL),
    ("attention: 128 queries a CTA", replace(DESIGNED, queries=128), USUAL),
    ("these three: changed", WAYS["changed"], USUAL),
    ("128 rows, staggered, clusters of 2", Choice(128, 2, staggered=True), USUAL),
    ("the same with the three: staggered", STAGGERED, USUAL),
    ("as built", BUILT, USUAL),
    ("as built, rows that fill no round not split", replace(BUILT, split_tail=False), USUAL),
    ("weight gradient: two halves of a tile, 96 CTAs", replace(DESIGNED, parts="halves"), USUAL),
    ("no gap between launches", DESIGNED, replace(USUAL, gap=0.0)),
    ("operands at once: no start", DESIGNED, replace(USUAL, start=0.0)),
    ("starts of 2,000 clocks", DESIGNED, replace(USUAL, start=2000.0)),
    ("epilogues: a warp alone never stalls", DESIGNED, replace(USUAL, stall=0.0)),
    ("epilogues: a warp alone stalls 60 %", DESIGNED, replace(USUAL, stall=0.6)),
    ("CTAs of a multiprocessor always wait together: designed", DESIGNED, replace(USUAL, hides=0.0)),
    ("halves always wait together: staggered", STAGGERED, replace(USUAL, hides=0.0)),
    ("CTAs of a multiprocessor always wait together: built", BUILT, replace(USUAL, hides=0.0)),
    ("loads that threads wait for take 1,200 clocks: built", BUILT, replace(USUAL, latency=1200.0)),
    ("an SM takes in 48 bytes a clock: built", BUILT, replace(USUAL, intake=48.0)),
    ("an SM takes in 48 bytes a clock: designed", DESIGNED, replace(USUAL, intake=48.0)),
    ("an SM takes in 48 bytes a clock: staggered", STAGGERED, replace(USUAL, intake=48.0)),
    ("an SM takes in 32 bytes a clock: designed", DESIGNED, replace(USUAL, intake=32.0)),
    ("an SM takes in 32 bytes a clock: staggered", STAGGERED, replace(USUAL, intake=32.0)),
)


def main(
    devices: Sequence[str], batches: Sequence[int], json_file: Path | None, folder: Path | None,
    recomputes: Sequence[str], kinds: Sequence[str],
) -> int:  # fmt: skip
    """Predict, print, write, and return 0."""
    found = collect(devices, batches, recomputes, kinds)
    console = wide_console()
    for line in tables.text(found):
        console.print(line, markup=False, highlight=False)
    if json_file:
        json_file.write_text(_json(found))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for name, entry in found["devices"].items():
            (folder / f"{name.lower()}.json").write_text(_json({**found, "devices": {name: entry}}))
        (folder / "README.md").write_text(tables.markdown(folder))
    return 0


def _json(found: Mapping[str, Any]) -> str:
    return json.dumps(found, indent=1) + "\n"


def collect(
    devices: Sequence[str], batches: Sequence[int], recomputes: Sequence[str], kinds: Sequence[str]
) -> dict[str, Any]:
    """Everything, as it is written to JSON, in microseconds; what may be chosen and changed, for the first device."""
    runs = [(kind, level, batch) for kind in kinds for level in recomputes for batch in batches]
    found = {
        "label": LABEL, "uncertainty": UNCERTAINTY,
        "constants": {name: constant(value) for name, value in arithmetic.CONSTANTS.items()},
        "designs": {name: asdict(one) | {"per_sm": one.per_sm} for name, one in design.table().items()},
        "ways": {name: asdict(choice) for name, choice in WAYS.items()},
        "devices": {
            name: {
                "runs": [_run(device(name), *run, phase) for run in runs for phase in PHASES],
                "choices": list(_choices(device(name), kinds, batches)) if number == 0 else [],
                "changes": list(_changes(device(name), kinds, batches)) if number == 0 else [],
            }
            for number, name in enumerate(devices)
        },
    }  # fmt: skip
    rounded: dict[str, Any] = _rounded(found)
    return rounded


def _rounded(found: Any) -> Any:
    """With six digits of each number, which no table shows."""
    if isinstance(found, dict):
        return {key: _rounded(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_rounded(value) for value in found]
    return float(f"{found:.6g}") if isinstance(found, float) else found


def _run(goal: Device, kind: str, level: str, batch: int, phase: str) -> dict[str, Any]:
    sizes = Sizes(batch, stream_bytes=KINDS[kind], recompute=level)
    theirs, terms = triton.launches(goal, sizes, phase), triton.TERMS
    less = {term: triton.launches(goal, sizes, phase, tuple(t for t in terms if t != term)) for term in terms}
    ways = {name: [_launch(one, goal) for one in PHASES[phase](sizes, choice)] for name, choice in WAYS.items()}
    return {
        "kind": kind, "recompute": level, "batch": batch, "phase": phase,
        "us": {name: sum(one["us"] for one in launches) for name, launches in ways.items()},
        "floor_us": floor(sizes, phase, goal),
        "launches": {name: ways[name] for name in SHOWN},
        "triton": {
            "us": sum(one.us for one in theirs), "committed_us": sum(one.committed for one in theirs),
            "without": {term: sum(one.us for one in found) for term, found in less.items()},
            "launches": [asdict(one) | {"bound_by": one.bound_by} for one in theirs],
        },
    }  # fmt: skip


def _launch(launch: Launch, goal: Device) -> dict[str, Any]:
    time = arithmetic.predict(launch, goal)
    return asdict(time) | {
        "us": time.us, "bound_by": time.bound_by, "waits": time.waits,
        "per_sm": launch.per_sm, "cluster": launch.cluster, "flops": launch.flops, "l2_bytes": launch.l2,
        "dram_bytes": launch.dram,
    }  # fmt: skip


def floor(sizes: Sizes, phase: str, goal: Device) -> float:
    """Microseconds of the phase: the larger of DRAM for inputs and outputs, and tensor cores for useful products."""
    moved, flops = useful(sizes, phase)
    return 1e6 * max(moved / goal.dram, flops / goal.peak)


def total(sizes: Sizes, phase: str, choice: Choice, goal: Device, by: Assumptions = USUAL) -> float:
    """Microseconds of a phase's launches."""
    return sum(arithmetic.predict(launch, goal, by).us for launch in PHASES[phase](sizes, choice))


def _choices(goal: Device, kinds: Sequence[str], batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    for kind in kinds:
        for batch in batches:
            sizes = Sizes(batch, stream_bytes=KINDS[kind])
            for choice in CHOICES:
                us = {phase: total(sizes, phase, choice, goal) for phase in PHASES}
                kept = {name: getattr(choice, name) for name in ("rows", "cluster", "inside")}
                yield {"kind": kind, "batch": batch} | kept | us


def _changes(goal: Device, kinds: Sequence[str], batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Ours, and the ratio to Triton's with the same constants. A choice of ours changes nothing of Triton's."""
    for kind in kinds:
        for batch in batches:
            sizes = Sizes(batch, stream_bytes=KINDS[kind])
            for what, choice, by in CHANGES:
                found: dict[str, Any] = {"kind": kind, "batch": batch, "what": what}
                for phase in PHASES:
                    us = total(sizes, phase, choice, goal, by)
                    theirs = sum(one.us for one in triton.launches(goal, sizes, phase, by=by))
                    found |= {phase: us, f"{phase} ratio": us / theirs}
                yield found
