"""Predictions as tables, as JSON, and as Markdown. Each says that nothing was timed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptx_emulator.predict.devices import Constant, device
from ptx_emulator.predict.model import CEILINGS, Prediction
from rich.table import Table

from cast_kernels.evidence import eager_model
from cast_kernels.evidence.model import LABEL, UNCERTAINTY

#: Phase of a B-CAST call. Training keeps for backward according to its recompute level.
PHASES = ("inference", "forward", "backward")
#: Origin of the counters.
TRACED = "traced: PTX's control flow was followed, every lane taken as active"
EMULATED = "traced, and corrected by what a sample of programs executed in emulation"
#: Kind -> its dtypes.
_DTYPES = {
    "bf16": "in bfloat16 throughout",
    "fp16": "in float16 throughout",
    "fp32": "in float32 throughout",
    "amp": "under autocast, streams and parameters in float32 and products in bfloat16, as `cast train` runs it",
    "amp16": "under autocast, streams in bfloat16, parameters in float32 and products in bfloat16",
}
#: Goals on H100: microseconds of the lower bound by batch; and backward over forward.
FORWARD_GOALS = {6: 130.0, 32: 550.0}
BACKWARD_GOAL = 2.2


@dataclass(frozen=True)
class PhasePrediction:
    """One phase at one batch size."""

    device: str
    batch: int
    phase: str
    launches: tuple[Prediction, ...]

    @property
    def us(self) -> float:
        return sum(launch.us for launch in self.launches)

    @property
    def floor(self) -> float:
        return sum(launch.floor for launch in self.launches)


@dataclass(frozen=True)
class Eager:
    """Eager's time by its own model."""

    device: str
    batch: int
    phase: str
    kind: str  # one of eager_model.EAGER
    us: float
    kernels: int
    bytes: int


def merge(launches: Iterable[Prediction]) -> list[tuple[int, Prediction]]:
    """Launches of one kernel with the same grid and time -> their number, and one of them."""
    seen: dict[tuple[str, tuple[int, int, int], float], tuple[int, Prediction]] = {}
    for launch in launches:
        key = (launch.kernel, launch.grid, launch.us)
        seen[key] = (seen.get(key, (0, launch))[0] + 1, launch)
    return list(seen.values())


def kernels(run: PhasePrediction) -> Table:
    """A table of one phase's kernels."""
    title = f"{run.device}, B={run.batch}, {run.phase}: at least {run.us:.0f} us; {LABEL}"
    table = Table("kernel", title=title, title_justify="left")
    for heading in ("launches", "CTAs", "a SM", "waves", "us", "bound by", *CEILINGS, "GFLOP", "DRAM MB", "floor us"):
        table.add_column(heading, justify="left" if heading == "bound by" else "right")
    for count, p in merge(run.launches):
        ctas = p.grid[0] * p.grid[1] * p.grid[2]
        table.add_row(
            p.kernel, str(count), str(ctas), str(p.ctas_per_sm), f"{p.waves:.2f}", f"{count * p.us:.1f}", p.bound_by,
            *(f"{count * getattr(p, name):.1f}" for name in CEILINGS), f"{count * p.flops / 1e9:.2f}",
            f"{count * p.dram_bytes / 1e6:.1f}", f"{count * p.floor:.1f}",
        )  # fmt: skip
    return table


def collect(
    runs: Sequence[PhasePrediction], eager: Sequence[Eager], counters: str, kind: str, recompute: str
) -> dict[str, Any]:
    """All results for JSON: by device, then one entry for each batch."""
    found: dict[str, Any] = {"label": LABEL, "uncertainty": UNCERTAINTY, "counters": counters, "recompute": recompute}
    found |= {"kind": kind, "dtypes": _DTYPES[kind], "assumptions": _shares(), "devices": {}}
    for name in dict.fromkeys(run.device for run in runs):
        batches = []
        for batch in dict.fromkeys(run.batch for run in runs if run.device == name):
            phases = {run.phase: run for run in runs if (run.device, run.batch) == (name, batch)}
            theirs = [asdict(e) for e in eager if (e.device, e.batch) == (name, batch)]
            batches.append({
                "batch": batch,
                "us": {phase: run.us for phase, run in phases.items()},
                "floor_us": {phase: run.floor for phase, run in phases.items()},
                "eager": [{key: e[key] for key in ("kind", "phase", "us", "kernels", "bytes")} for e in theirs],
                "launches": {phase: [_launch(p) for p in run.launches] for phase, run in phases.items()},
            })  # fmt: skip
        found["devices"][name] = {"constants": _constants(name), "batches": batches}
    return found


def _launch(p: Prediction) -> dict[str, Any]:
    return asdict(p) | {"us": p.us, "bound_by": p.bound_by}


def _constants(name: str) -> dict[str, Any]:
    goal = device(name)
    named: Mapping[str, Constant] = {
        "clock": goal.clock, "efficiency": goal.efficiency, "L2": goal.l2, "DRAM": goal.dram,
        **{f"tensor cores, {kind}": rate for kind, rate in goal.tensor.items()},
    }  # fmt: skip
    return {key: constant(value) for key, value in named.items()} | {"multiprocessors": goal.target.processors}


def constant(value: Constant) -> dict[str, Any]:
    """The constant for JSON."""
    return {"value": float(value), "unit": value.unit, "source": value.source, "assumed": value.assumed}


def _shares() -> dict[str, Any]:
    shares = {
        "eager's tensor share": eager_model.TENSOR_SHARE,
        "eager's DRAM share": eager_model.DRAM_SHARE,
        "eager's least": eager_model.LEAST,
    }
    return {name: constant(value) for name, value in shares.items()}


#: Headings of the summary.
_COLUMNS = (
    "GPU", "B", *PHASES, "backward / forward", "floor forward", "floor backward",
    *(f"eager {kind} {phase}" for kind in eager_model.EAGER for phase in ("forward", "backward")),
    "forward bound by", "backward bound by",
)  # fmt: skip


def rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The summary's cells, microseconds."""
    cells = []
    for name, entry in found["devices"].items():
        for one in entry["batches"]:
            us, floor = one["us"], one["floor_us"]
            eager = {(e["kind"], e["phase"]): e["us"] for e in one["eager"]}
            cells.append((
                name, str(one["batch"]), *(f"{us[phase]:.0f}" for phase in PHASES),
                f"{us['backward'] / us['forward']:.2f}", f"{floor['forward']:.0f}", f"{floor['backward']:.0f}",
                *(f"{eager[kind, phase]:.0f}" for kind in eager_model.EAGER for phase in ("forward", "backward")),
                *(_binding(one["launches"][phase]) for phase in ("forward", "backward")),
            ))  # fmt: skip
    return cells


def _binding(launches: Sequence[Mapping[str, Any]]) -> str:
    """Ceilings with their shares of the time, largest first."""
    shares: dict[str, float] = {}
    for launch in launches:
        shares[launch["bound_by"]] = shares.get(launch["bound_by"], 0.0) + launch["us"]
    whole = sum(shares.values())
    largest = sorted(shares, key=lambda name: -shares[name])
    return ", ".join(f"{name} {shares[name] / whole:.0%}" for name in largest if shares[name] > 0.05 * whole)


def summary(found: Mapping[str, Any]) -> Table:
    """A table of all totals."""
    table = Table(*_COLUMNS, title=f"microseconds, +-{UNCERTAINTY:.0%}; {LABEL}", title_justify="left")
    for cells in rows(found):
        table.add_row(*cells)
    return table


def targets(found: Mapping[str, Any]) -> list[str]:
    """Each goal and its prediction. The goals are for bfloat16 throughout."""
    if found["kind"] != "bf16":
        return []
    lines = []
    for one in found["devices"].get("H100", {"batches": []})["batches"]:
        us, batch = one["us"], one["batch"]
        if batch in FORWARD_GOALS:
            for phase in ("inference", "forward"):
                lines.append(_goal(f"H100, B={batch}, {phase}", us[phase], FORWARD_GOALS[batch], " us"))
        ratio = us["backward"] / us["forward"]
        lines.append(_goal(f"H100, B={batch}, backward / forward", ratio, BACKWARD_GOAL, ""))
    return lines


def _goal(what: str, value: float, goal: float, unit: str) -> str:
    digits = 2 if goal < 10 else 0
    return f"{'met   ' if value <= goal else 'missed'}  {what}: {value:.{digits}f}{unit}, goal {goal:g}{unit}"


def failures(runs: Sequence[PhasePrediction]) -> list[str]:
    """Kernels that fit no multiprocessor."""
    found = (f"FAIL  {run.device} {p.kernel}: {p.why_not}" for run in runs for p in run.launches if p.why_not)
    return list(dict.fromkeys(found))


def write(found: Mapping[str, Any], folder: Path) -> None:
    """Write one JSON file for each device, and README.md with the tables of all files in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, entry in found["devices"].items():
        alone = {**found, "devices": {name: entry}}
        (folder / f"{name.lower()}.json").write_text(json.dumps(alone, indent=1) + "\n")
    (folder / "README.md").write_text(markdown(folder))


def markdown(folder: Path) -> str:
    """The folder's predictions as text."""
    all_found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    devices = {name: entry for found in all_found for name, entry in found["devices"].items()}
    kind, level, counters = (all_found[0][key] for key in ("kind", "recompute", "counters"))
    options = f"--kind {kind} --recompute {level}{' --emulate' if counters == EMULATED else ''}"
    lines = [
        "# Predicted times of B-CAST's Triton kernels", "",
        f"Written by `cast-kernels predict {options} --folder`. "
        f"**{LABEL[0].upper()}{LABEL[1:]}.** Microseconds at the paper's size, {all_found[0]['dtypes']}; a lower bound "
        f"for ours with an uncertainty of +-{UNCERTAINTY:.0%}: inside a kernel all overlaps, and launches have no "
        "gaps. Eager's times are by its own model, with the shares of the peaks that library kernels reach: ours to "
        "theirs is an upper bound of the speed-up. Eager is in bf16 throughout (`bf16`), or under CUDA's autocast with "
        "streams in float32 (`amp`: what `cast train` runs) or in bfloat16 (`amp16`).", "",
        *markdown_table(_COLUMNS, rows({"devices": devices})), "",
        "`floor`: for each of our kernels the larger of its FLOPs at the tensor peak and its tensors' bytes at DRAM's "
        "bandwidth. `inference` keeps nothing for backward, training what "
        f"`{level}` keeps ([levels](../../../../docs/triton.md#what-is-kept)).", "",
        "## Constants", "",
    ]  # fmt: skip
    constants = [
        (name, key, f"{c['value']:g} {c['unit']}", "assumption" if c["assumed"] else "", c["source"])
        for name, entry in devices.items()
        for key, c in entry["constants"].items()
        if isinstance(c, dict)
    ]
    lines += markdown_table(("GPU", "constant", "value", "", "source"), constants)
    return "\n".join(lines) + "\n"


def markdown_table(headings: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]
