"""`cast-kernels predict`: how long B-CAST takes at least, by the model, on GPUs that need not be here.

The product's own launches are compiled for the GPU and traced; nothing is run and nothing is timed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from rich.table import Table

import cast_kernels
from cast_kernels.evidence import model, trace
from cast_kernels.evidence.cases import Case
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.devices import Device, device
from cast_kernels.evidence.driver import Launch, offline_driver
from cast_kernels.evidence.model import CEILINGS, LABEL, UNCERTAINTY, Prediction
from cast_kernels.evidence.resources import Resources, resources

#: Phase -> how B-CAST is called. Training keeps for backward what its default recompute level keeps.
PHASES = ("inference", "forward", "backward")


class _Keeper:
    """Keeps every launch and runs none."""

    enforces_limits = False  # a kernel over the limit is to be reported, not to end the prediction

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launch(self, launch: Launch) -> None:
        self.launches.append(launch)

    def take(self) -> list[Launch]:
        """Those since the last call."""
        taken, self.launches = self.launches, []
        return taken


@dataclass(frozen=True)
class Run:
    """One phase at one batch size."""

    device: str
    batch: int
    phase: str
    launches: tuple[Prediction, ...]

    @property
    def us(self) -> float:
        return model.total(self.launches)

    @property
    def floor(self) -> float:
        return sum(launch.floor for launch in self.launches)


def predict(name: str, cases: Sequence[Case], cache: Path | None = None) -> list[Run]:
    """Predict every phase of each case.

    Args:
        name: of the device.
        cases: problems; `backward` says whether training is predicted beside inference.
        cache: folder of compiled kernels that is used again, None for a temporary one.
    """
    goal, runs = device(name), []
    with offline_driver(goal.target, _Keeper(), cache) as keeper:
        for case in cases:
            for phase, launches in _phases(case, keeper):
                runs.append(Run(name, case.batch, phase, tuple(predict_launches(launches, goal))))
    return runs


def predict_launches(launches: Iterable[Launch], goal: Device) -> list[Prediction]:
    """Each launch by itself, from the trace of its PTX and the resources of its machine code."""
    found = []
    for launch in launches:
        used = _resources(_Key(launch))
        ratio = used.instructions / trace.length(launch)
        found.append(model.predict(launch, used, trace.trace(launch), ratio, goal))
    return found


class _Key:
    """A launch that stands for all launches of its compiled kernel."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch

    def __hash__(self) -> int:
        return hash(self.launch.identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.launch.identity == self.launch.identity


@lru_cache(maxsize=512)
def _resources(key: _Key) -> Resources:
    launch = key.launch
    return resources(launch.asm, launch.metadata.shared, launch.metadata.num_warps, launch.target)


def _phases(case: Case, keeper: _Keeper) -> Iterable[tuple[str, list[Launch]]]:
    """The launches of each phase. Tensors are uninitialised: nothing reads them."""
    made = cast_kernels.BCAST(
        case.dim, case.bottleneck, case.heads, case.frames, case.patches, case.windows, case.directions,
        case.positions, "triton", case.recompute,
    ).bfloat16()  # fmt: skip
    shape = (case.batch, case.frames, case.patches, case.dim)
    spatial = torch.empty(shape[0], shape[1], shape[2] + 1, shape[3], dtype=torch.bfloat16)
    temporal = torch.empty(shape, dtype=torch.bfloat16)
    with torch.no_grad():
        made(spatial, temporal)
    yield "inference", keeper.take()
    if not case.backward:
        return
    outputs = made(spatial.requires_grad_(), temporal.requires_grad_())
    yield "forward", keeper.take()
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    yield "backward", keeper.take()


def merge(launches: Sequence[Prediction]) -> list[tuple[int, Prediction]]:
    """Launches of one kernel that share a ceiling and a grid -> how many, and one of them."""
    seen: dict[tuple[str, tuple[int, int, int], float], tuple[int, Prediction]] = {}
    for launch in launches:
        key = (launch.kernel, launch.grid, launch.us)
        seen[key] = (seen.get(key, (0, launch))[0] + 1, launch)
    return list(seen.values())


def render(run: Run) -> Table:
    """One phase as a table for people."""
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


def report(runs: Sequence[Run]) -> dict[str, object]:
    """What is written as JSON."""
    return {
        "label": LABEL,
        "uncertainty": UNCERTAINTY,
        "runs": [
            {"device": run.device, "batch": run.batch, "phase": run.phase, "us": run.us, "floor_us": run.floor}
            | {"launches": [asdict(p) | {"us": p.us, "bound_by": p.bound_by} for p in run.launches]}
            for run in runs
        ],
    }


def main(devices: Sequence[str], batches: Sequence[int], json_file: Path | None, cache: Path | None) -> int:
    """Predict, print, and return the exit code: 1 if a kernel does not fit a device."""
    console, runs = wide_console(), []
    for name in devices:
        runs += predict(name, [replace(Case(), batch=batch) for batch in batches], cache)
    for run in runs:
        console.print(render(run))
    _summarise(runs)
    if json_file:
        json_file.write_text(json.dumps(report(runs), indent=1) + "\n")
    return 1 if any(p.why_not for run in runs for p in run.launches) else 0


def _summarise(runs: Sequence[Run]) -> None:
    console = wide_console()
    times = {(run.device, run.batch, run.phase): run for run in runs}
    table = Table("device", "B", title=f"microseconds, {LABEL}; +-{UNCERTAINTY:.0%}", title_justify="left")
    for heading in (*PHASES, "backward / forward", *(f"floor {phase}" for phase in PHASES)):
        table.add_column(heading, justify="right")
    for name, batch in dict.fromkeys((run.device, run.batch) for run in runs):
        three = [times[name, batch, phase] for phase in PHASES]
        table.add_row(
            name, str(batch), *(f"{run.us:.0f}" for run in three), f"{three[2].us / three[1].us:.2f}",
            *(f"{run.floor:.0f}" for run in three),
        )  # fmt: skip
    console.print(table)
    for run in runs:
        for p in run.launches:
            if p.why_not:
                console.print(f"FAIL  {run.device} {p.kernel}: {p.why_not}", markup=False)
