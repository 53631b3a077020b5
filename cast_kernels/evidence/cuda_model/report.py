"""`cast-kernels predict --cuda`: the CUDA C++ kernels by their model, beside Triton's by the same one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ptx_emulator.predict.devices import Device, device

from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.cuda_model import arithmetic, design, triton
from cast_kernels.evidence.cuda_model.arithmetic import USUAL, Assumptions
from cast_kernels.evidence.cuda_model.launches import PHASES
from cast_kernels.evidence.cuda_model.problem import Choice, Sizes, useful
from cast_kernels.evidence.model import UNCERTAINTY
from cast_kernels.evidence.prediction_report import constant, markdown_table

LABEL = "predicted by arithmetic: no CUDA C++ kernel of ours exists yet, and none of Triton's has been timed"
#: GPUs that the kernels are designed for: they need wgmma.
DEVICES = ("H100", "H200")
#: Kind -> bytes of an element of the streams, and of parameters.
KINDS = {"bf16": 2, "amp": 4}
#: The decomposition that the totals are of.
CHOSEN = Choice()
CHOICES = tuple(Choice(rows, cluster, fused) for fused in (False, True) for rows in (64, 128) for cluster in (1, 2, 4))
#: What else could be, one thing at a time: (what, the choice, the model's constants).
CHANGES: tuple[tuple[str, Choice, Assumptions], ...] = (
    ("nothing", CHOSEN, USUAL),
    ("position tables in bf16", replace(CHOSEN, table_bytes=2), USUAL),
    ("weight gradient: two halves of a tile, 96 CTAs", replace(CHOSEN, parts="halves"), USUAL),
    ("no gap between launches", CHOSEN, replace(USUAL, gap=0.0)),
    ("operands at once: no start", CHOSEN, replace(USUAL, start=0.0)),
    ("starts of 2,000 clocks", CHOSEN, replace(USUAL, start=2000.0)),
    ("epilogues: a warp alone never stalls", CHOSEN, replace(USUAL, stall=0.0)),
    ("epilogues: a warp alone stalls 60 %", CHOSEN, replace(USUAL, stall=0.6)),
    ("a multiprocessor takes in 48 bytes a clock", CHOSEN, replace(USUAL, intake=48.0)),
    ("a multiprocessor takes in 32 bytes a clock", CHOSEN, replace(USUAL, intake=32.0)),
    ("the same with 128 rows and clusters of 2", Choice(128, 2), replace(USUAL, intake=32.0)),
)
#: H100, streams in bf16, recompute "cheap": (phase, clips) -> microseconds of the goal, what is accepted, and the goal
#: of the ratio to Triton.
GOALS = {
    ("forward", 6): (89, 105, 0.69), ("forward", 32): (400, 460, 0.62),
    ("backward", 6): (235, 290, 0.65), ("backward", 32): (1055, 1250, 0.58),
}  # fmt: skip


def main(
    devices: Sequence[str], batches: Sequence[int], json_file: Path | None, folder: Path | None,
    recomputes: Sequence[str], kinds: Sequence[str],
) -> int:  # fmt: skip
    """Predict, print, write, and return 0."""
    found = collect(devices, batches, recomputes, kinds)
    console = wide_console()
    for line in text(found):
        console.print(line, markup=False, highlight=False)
    if json_file:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    if folder:
        write(found, folder)
    return 0


def collect(
    devices: Sequence[str], batches: Sequence[int], recomputes: Sequence[str], kinds: Sequence[str]
) -> dict[str, Any]:
    """Everything, as it is written to JSON."""
    runs = [(kind, level, batch) for kind in kinds for level in recomputes for batch in batches]
    return {
        "label": LABEL, "uncertainty": UNCERTAINTY,
        "constants": {name: constant(value) for name, value in arithmetic.CONSTANTS.items()},
        "designs": designs(),
        "devices": {
            name: {
                "runs": [_run(device(name), *run, phase) for run in runs for phase in PHASES],
                "choices": list(_choices(device(name), kinds, batches)),
                "changes": list(_changes(device(name), kinds, batches)),
            }
            for name in devices
        },
    }  # fmt: skip


def designs() -> dict[str, Any]:
    """The resources that the model takes, by kernel."""
    return {name: asdict(one) | {"per_sm": one.per_sm} for name, one in design.table().items()}


def _run(goal: Device, kind: str, level: str, batch: int, phase: str) -> dict[str, Any]:
    sizes = Sizes(batch, stream_bytes=KINDS[kind], recompute=level)
    launches = PHASES[phase](sizes, CHOSEN)
    times = [arithmetic.predict(launch, goal) for launch in launches]
    theirs = triton.launches(goal, sizes, phase)
    return {
        "kind": kind, "recompute": level, "batch": batch, "phase": phase,
        "us": sum(time.us for time in times), "floor_us": floor(sizes, phase, goal),
        "launches": [
            asdict(time) | {"us": time.us, "bound_by": time.bound_by, "waits": time.waits, "flops": launch.flops,
                            "l2_bytes": launch.l2, "dram_bytes": launch.dram, "per_sm": launch.per_sm,
                            "cluster": launch.cluster}
            for launch, time in zip(launches, times, strict=True)
        ],
        "triton": {
            "us": sum(one.us for one in theirs), "committed_us": sum(one.committed for one in theirs),
            "launches": [asdict(one) | {"bound_by": one.bound_by} for one in theirs],
        },
    }  # fmt: skip


def floor(sizes: Sizes, phase: str, goal: Device) -> float:
    """Microseconds of the phase: the larger of DRAM for inputs and outputs, and tensor cores for useful products."""
    moved, flops = useful(sizes, phase)
    return 1e6 * max(moved / goal.dram, flops / goal.peak)


def _choices(goal: Device, kinds: Sequence[str], batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    for kind in kinds:
        for batch in batches:
            sizes = Sizes(batch, stream_bytes=KINDS[kind])
            for choice in CHOICES:
                us = {
                    phase: sum(arithmetic.predict(launch, goal).us for launch in make(sizes, choice))
                    for phase, make in PHASES.items()
                }
                yield {"kind": kind, "batch": batch} | asdict(choice) | us


def _changes(goal: Device, kinds: Sequence[str], batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Ours and Triton's with one thing changed. A choice of ours changes nothing of Triton's."""
    for kind in kinds:
        for batch in batches:
            sizes = Sizes(batch, stream_bytes=KINDS[kind])
            for what, choice, by in CHANGES:
                found: dict[str, Any] = {"kind": kind, "batch": batch, "what": what}
                for phase, make in PHASES.items():
                    us = sum(arithmetic.predict(launch, goal, by).us for launch in make(sizes, choice))
                    found[phase] = us
                    found[f"{phase} ratio"] = us / sum(one.us for one in triton.launches(goal, sizes, phase, by=by))
                yield found


def text(found: Mapping[str, Any]) -> list[str]:
    """What is printed."""
    lines = [found["label"], "", *markdown_table(TOTALS, totals(found))]
    for name, entry in found["devices"].items():
        for run in entry["runs"]:
            heading = f"{name}, {run['kind']}, {run['recompute']}, B={run['batch']}, {run['phase']}: {run['us']:.0f} us"
            lines += ["", heading, *markdown_table(KERNELS, kernels(run))]
    lines += ["", *markdown_table(_CHOICE_COLUMNS, choice_rows(found))]
    return [*lines, "", *markdown_table(_CHANGE_COLUMNS, change_rows(found))]


TOTALS = (
    "GPU", "kind", "recompute", "B", "phase", "CUDA us", "floor us", "Triton, this model", "ratio",
    "Triton as committed", "ratio", "goal us", "accepted us", "goal of the ratio",
)  # fmt: skip
KERNELS = (
    "kernel", "CTAs", "an SM", "cluster", "rounds", "us", "bound by", "tensor", "shared", "intake", "issue", "special",
    "waits", "L2", "DRAM", "floor",
)  # fmt: skip
_CHOICE_COLUMNS = ("GPU", "kind", "B", "rows", "cluster", "attention", "forward us", "backward us")


def totals(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a run."""
    cells = []
    for name, entry in found["devices"].items():
        for run in entry["runs"]:
            us, triton = run["us"], run["triton"]
            asked = (name, run["kind"], run["recompute"]) == ("H100", "bf16", "cheap")
            goals = GOALS.get((run["phase"], run["batch"])) if asked else None
            cells.append((
                name, run["kind"], run["recompute"], str(run["batch"]), run["phase"], f"{us:.0f}",
                f"{run['floor_us']:.0f}", f"{triton['us']:.0f}", f"{us / triton['us']:.2f}",
                f"{triton['committed_us']:.0f}", f"{us / triton['committed_us']:.2f}",
                *(map(str, goals) if goals else ("", "", "")),
            ))  # fmt: skip
    return cells


def kernels(run: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a launch."""
    cells = []
    for one in run["launches"]:
        parts = one["parts"]
        cells.append((
            one["name"], str(one["ctas"]), str(one["per_sm"]), str(one["cluster"]), str(one["rounds"]),
            f"{one['us']:.1f}", one["bound_by"],
            *(f"{parts[name]:.1f}" for name in arithmetic.MULTIPROCESSOR), f"{one['waits']:.1f}",
            f"{parts['l2']:.1f}", f"{parts['dram']:.1f}", f"{one['floor']:.1f}",
        ))  # fmt: skip
    return cells


def choice_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a choice."""
    return [
        (name, one["kind"], str(one["batch"]), str(one["rows"]), str(one["cluster"]),
         "in exchange" if one["fused"] else "a kernel", f"{one['forward']:.0f}", f"{one['backward']:.0f}")
        for name, entry in found["devices"].items() for one in entry["choices"]
    ]  # fmt: skip


_CHANGE_COLUMNS = ("GPU", "kind", "B", "what is changed", "forward us", "to Triton", "backward us", "to Triton")


def change_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a change."""
    return [
        (name, one["kind"], str(one["batch"]), one["what"], f"{one['forward']:.0f}", f"{one['forward ratio']:.2f}",
         f"{one['backward']:.0f}", f"{one['backward ratio']:.2f}")
        for name, entry in found["devices"].items() for one in entry["changes"]
    ]  # fmt: skip


def write(found: Mapping[str, Any], folder: Path) -> None:
    """One JSON file a device, and README.md with the tables of all that lie in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, entry in found["devices"].items():
        alone = {**found, "devices": {name: entry}}
        (folder / f"{name.lower()}.json").write_text(json.dumps(alone, indent=1) + "\n")
    (folder / "README.md").write_text(markdown(folder))


def markdown(folder: Path) -> str:
    """The folder's predictions as text."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = {**files[0], "devices": {name: one for file in files for name, one in file["devices"].items()}}
    lines = [
        "# Predicted times of B-CAST's CUDA C++ kernels", "",
        "Written by `cast-kernels predict --cuda --folder`. "
        f"**{LABEL[0].upper()}{LABEL[1:]}.** Microseconds at the paper's size, +-{UNCERTAINTY:.0%}. How it is "
        "computed, and what follows: [the decomposition and its arithmetic](../../../docs/cuda.md). `bf16`: streams "
        "and parameters in bfloat16; `amp`: both in float32, products in bfloat16.", "",
        *markdown_table(TOTALS, totals(found)), "",
        "`floor`: the larger of what DRAM needs for inputs and outputs, with what forward keeps for backward, and what "
        "tensor cores need for the products. `Triton, this model`: Triton's launches with waits, spills and gaps. "
        "`Triton as committed`: [the predictions](../README.md), which have none of these.",
    ]  # fmt: skip
    for name, entry in found["devices"].items():
        for run in entry["runs"]:
            if (run["recompute"], run["batch"]) in (("cheap", 6), ("cheap", 32)):
                heading = f"## {name}, {run['kind']}, {run['batch']} clips, {run['phase']}"
                lines += ["", heading, "", *markdown_table(KERNELS, kernels(run))]
    lines += ["", "## What may be chosen", "", *markdown_table(_CHOICE_COLUMNS, choice_rows(found))]
    lines += ["", "## If one thing were otherwise", "", *markdown_table(_CHANGE_COLUMNS, change_rows(found))]
    lines += ["", "## Resources", "", *markdown_table(_DESIGN_COLUMNS, _design_rows(found)), "", "## Constants", ""]
    lines += markdown_table(("constant", "value", "", "source"), _constant_rows(found))
    return "\n".join(lines) + "\n"


_DESIGN_COLUMNS = ("kernel", "threads", "registers at launch", "most registers", "shared memory", "CTAs an SM", "known")


def _design_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    keys = ("threads", "registers", "most", "shared", "per_sm", "known")
    return [(name, *(str(one[key]) for key in keys)) for name, one in found["designs"].items()]


def _constant_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, f"{c['value']:g} {c['unit']}", "assumption" if c["assumed"] else "", c["source"])
        for name, c in found["constants"].items()
    ]
