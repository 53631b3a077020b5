"""The tables of `cast-kernels predict --cuda`, as text and as the Markdown beside the JSON, from the JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cast_kernels.evidence.cuda_model.arithmetic import MULTIPROCESSOR
from cast_kernels.evidence.cuda_model.triton import TERMS
from cast_kernels.evidence.prediction_report import markdown_table

Found = Mapping[str, Any]
Rows = list[tuple[str, ...]]
#: H100, streams in bf16, recompute "cheap": (phase, clips) -> microseconds of the goal, what is accepted, and the goal
#: of the ratio to Triton as committed.
GOALS = {
    ("forward", 6): (89, 105, 0.69), ("forward", 32): (400, 460, 0.62),
    ("backward", 6): (235, 290, 0.65), ("backward", 32): (1055, 1250, 0.58),
}  # fmt: skip
_TOTALS = (
    "GPU", "kind", "recompute", "B", "phase", "designed", "changed", "staggered", "built", "floor",
    "Triton, this model", "ratios", "Triton as committed", "ratios", "goal", "accepted", "goal of the ratio",
)  # fmt: skip
_KERNELS = (
    "kernel", "CTAs", "an SM", "cluster", "rounds", "us", "bound by", *MULTIPROCESSOR, "waits", "L2", "DRAM", "floor"
)  # fmt: skip
_CHOICES = ("GPU", "kind", "B", "rows", "cluster", "inside of exchange", "forward", "backward")
_CHANGES = ("GPU", "kind", "B", "what", "forward", "to Triton", "backward", "to Triton")
_TRITON = ("GPU", "kind", "recompute", "B", "phase", "as committed", *TERMS, "together")
_DESIGNS = (
    "kernel",
    "threads",
    "registers at launch",
    "most registers",
    "shared memory",
    "spills",
    "CTAs an SM",
    "known",
)


def text(found: Found) -> list[str]:
    """What is printed."""
    lines = [found["label"], "", *markdown_table(_TOTALS, totals(found))]
    for name, entry in found["devices"].items():
        for run in entry["runs"]:
            for way, launches in run["launches"].items():
                heading = f"{name}, {run['kind']}, {run['recompute']}, B={run['batch']}, {run['phase']}, {way}"
                lines += ["", f"{heading}: {run['us'][way]:.0f} us", *markdown_table(_KERNELS, kernels(launches))]
    for columns, rows in ((_CHOICES, choices(found)), (_CHANGES, changes(found)), (_TRITON, terms(found))):
        lines += ["", *markdown_table(columns, rows)]
    return lines


def totals(found: Found) -> Rows:
    """One row a run."""
    cells = []
    for name, entry in found["devices"].items():
        for run in entry["runs"]:
            us, theirs = run["us"].values(), run["triton"]
            asked = (name, run["kind"], run["recompute"]) == ("H100", "bf16", "cheap")
            goals = GOALS.get((run["phase"], run["batch"])) if asked else None
            cells.append((
                *_run(name, run), *(f"{one:.0f}" for one in us), f"{run['floor_us']:.0f}",
                f"{theirs['us']:.0f}", _ratios(us, theirs["us"]),
                f"{theirs['committed_us']:.0f}", _ratios(us, theirs["committed_us"]),
                *(map(str, goals) if goals else ("", "", "")),
            ))  # fmt: skip
    return cells


def _run(name: str, run: Found) -> tuple[str, ...]:
    return name, run["kind"], run["recompute"], str(run["batch"]), run["phase"]


def _ratios(ours: Any, theirs: float) -> str:
    return ", ".join(f"{one / theirs:.2f}" for one in ours)


def kernels(launches: Sequence[Found]) -> Rows:
    """One row a launch."""
    return [
        (
            one["name"], *(str(one[key]) for key in ("ctas", "per_sm", "cluster", "rounds")), f"{one['us']:.1f}",
            one["bound_by"], *(f"{one['parts'][part]:.1f}" for part in MULTIPROCESSOR), f"{one['waits']:.1f}",
            *(f"{one['parts'][part]:.1f}" for part in ("l2", "dram")), f"{one['floor']:.1f}",
        )
        for one in launches
    ]  # fmt: skip


def choices(found: Found) -> Rows:
    """One row a choice of rows, clusters and the place of attention."""
    return [
        (name, one["kind"], str(one["batch"]), str(one["rows"]), str(one["cluster"]),
         ", ".join(one["inside"]) or "none", f"{one['forward']:.0f}", f"{one['backward']:.0f}")
        for name, entry in found["devices"].items() for one in entry["choices"]
    ]  # fmt: skip


def changes(found: Found) -> Rows:
    """One row a change."""
    return [
        (name, one["kind"], str(one["batch"]), one["what"], f"{one['forward']:.0f}", f"{one['forward ratio']:.2f}",
         f"{one['backward']:.0f}", f"{one['backward ratio']:.2f}")
        for name, entry in found["devices"].items() for one in entry["changes"]
    ]  # fmt: skip


def terms(found: Found) -> Rows:
    """What each added term makes of Triton's time: what would be missing without it."""
    cells = []
    for name, entry in found["devices"].items():
        for run in entry["runs"]:
            theirs = run["triton"]
            less = (f"{theirs['us'] - theirs['without'][term]:.0f}" for term in TERMS)
            cells.append((*_run(name, run), f"{theirs['committed_us']:.0f}", *less, f"{theirs['us']:.0f}"))
    return cells


def markdown(folder: Path) -> str:
    """The folder's predictions as text."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = {**files[0], "devices": {name: one for file in files for name, one in file["devices"].items()}}
    label = found["label"]
    lines = [
        "# Predicted times of B-CAST's CUDA C++ kernels", "",
        f"Written by `cast-kernels predict --cuda --folder`. **{label[0].upper()}{label[1:]}.** Microseconds at the "
        f"paper's size, +-{found['uncertainty']:.0%}. How it is computed, and what follows: [the decomposition and its "
        "arithmetic](../../../docs/cuda.md). `bf16`: streams and parameters in bfloat16; `amp`: both in float32, "
        "products in bfloat16.", "",
        *markdown_table(_TOTALS, totals(found)), "",
        "`designed`, `changed`, `staggered`: [three ways to cut it](../../../docs/cuda.md#what-would-make-it-faster); "
        "`built`: [what csrc/cuda launches](../../../docs/cuda.md#as-built). The ratios are theirs in this order. "
        "`floor`: the larger of what DRAM needs for inputs and outputs, with "
        "what forward keeps for backward, and what tensor cores need for the products. `Triton, this model`: Triton's "
        "launches with intake, waits, spills and gaps. `Triton as committed`: [the predictions](../README.md), which "
        "have none of these.",
    ]  # fmt: skip
    for name, entry in found["devices"].items():
        for run in entry["runs"]:
            if (name, run["recompute"]) == ("H100", "cheap") and run["batch"] in (6, 32):
                for way in run["launches"]:
                    lines += ["", f"## {name}, {run['kind']}, {run['batch']} clips, {run['phase']}, {way}", ""]
                    lines += markdown_table(_KERNELS, kernels(run["launches"][way]))
    for heading, columns, rows in (
        ("Rows, clusters, and where attention is", _CHOICES, choices(found)),
        ("If one thing were otherwise", _CHANGES, changes(found)),
        ("What the added terms make of Triton's times", _TRITON, terms(found)),
        ("Resources", _DESIGNS, _designs(found)),
        ("Constants", ("constant", "value", "", "source"), _constants(found)),
    ):
        lines += ["", f"## {heading}", "", *markdown_table(columns, rows)]
    return "\n".join(lines) + "\n"


def _designs(found: Found) -> Rows:
    keys = ("threads", "registers", "most", "shared", "spills", "per_sm", "known")
    return [(name, *(str(one[key]) for key in keys)) for name, one in found["designs"].items()]


def _constants(found: Found) -> Rows:
    return [
        (name, f"{c['value']:g} {c['unit']}", "assumption" if c["assumed"] else "", c["source"])
        for name, c in found["constants"].items()
    ]
