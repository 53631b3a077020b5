"""`cast-kernels predict`: the least time of B-CAST by the model, without the GPU.

The product's own launches are compiled for the GPU and traced; nothing runs and nothing is timed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from ptx_emulator.predict.devices import Device, device
from ptx_emulator.predict.model import Prediction
from ptx_emulator.predict.resources import Resources, resources
from ptx_emulator.triton.driver import Launch, offline_driver

import cast_kernels
from cast_kernels.evidence import eager_model, model, trace
from cast_kernels.evidence import prediction_report as report
from cast_kernels.evidence.autocast import cuda_rules
from cast_kernels.evidence.cases import KINDS, Case, Kind
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.corrections import Corrections
from cast_kernels.evidence.prediction_report import PhasePrediction


class Keeper:
    """Keeps every launch and runs none."""

    enforces_limits = False  # a kernel over the limit is reported, and must not end the prediction

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launch(self, launch: Launch) -> None:
        self.launches.append(launch)

    def take(self) -> list[Launch]:
        """The launches since the last call."""
        taken, self.launches = self.launches, []
        return taken


def predict(
    name: str, cases: Sequence[Case], cache: Path | None = None, emulated: bool = False, kind: str = "amp"
) -> list[PhasePrediction]:
    """Predict every phase of each case.

    Args:
        name: of the device.
        cases: problems; `backward` adds training to inference.
        cache: folder of compiled kernels for reuse, None for a temporary one.
        emulated: whether to correct the trace by executing some CTAs of each kernel in the emulator.
        kind: key of :data:`~cast_kernels.evidence.cases.KINDS`.
    """
    goal, runs = device(name), []
    corrections = Corrections() if emulated else None
    with offline_driver(goal.target, Keeper(), cache) as keeper:
        for case in cases:
            for phase, launches in _phases(case, keeper, KINDS[kind]):
                runs.append(
                    PhasePrediction(name, case.batch, phase, tuple(predict_launches(launches, goal, corrections)))
                )
    return runs


def predict_launches(
    launches: Iterable[Launch], goal: Device, corrections: Corrections | None = None
) -> list[Prediction]:
    """Each launch alone, from the trace of its PTX and the resources of its machine code."""
    found = []
    for launch in launches:
        used = _resources(_Key(launch))
        ratio = used.instructions / trace.length(launch)
        ctas = trace.ctas(launch)
        if corrections is not None:
            ctas = [corrections.apply(launch, one) for one in ctas]
        found.append(model.predict(launch, used, ctas, ratio, goal))
    return found


class _Key:
    """A launch as key for all launches of its compiled kernel."""

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


def _phases(case: Case, keeper: Keeper, kind: Kind) -> Iterable[tuple[str, list[Launch]]]:
    """The launches of each phase. Tensors are uninitialised, because nothing reads them."""
    made = cast_kernels.BCAST(
        case.dim, case.bottleneck, case.heads, case.frames, case.patches, case.windows, case.directions,
        case.positions, "triton", case.recompute,
    ).to(kind.dtype)  # fmt: skip
    shape = (case.batch, case.frames, case.patches, case.dim)
    stream = kind.streams or kind.dtype
    spatial = torch.empty(shape[0], shape[1], shape[2] + 1, shape[3], dtype=stream)
    temporal = torch.empty(shape, dtype=stream)
    with torch.no_grad(), cuda_rules(kind.autocast):
        made(spatial, temporal)
    yield "inference", keeper.take()
    if not case.backward:
        return
    with cuda_rules(kind.autocast):
        outputs = made(spatial.requires_grad_(), temporal.requires_grad_())
    yield "forward", keeper.take()
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    yield "backward", keeper.take()


def main(
    devices: Sequence[str], batches: Sequence[int], json_file: Path | None, folder: Path | None, cache: Path | None,
    emulated: bool, recompute: str, kind: str,
) -> int:  # fmt: skip
    """Predict, print, write, and return the exit code: 1 if a kernel does not fit a device."""
    cases = [replace(Case(), batch=batch, recompute=recompute) for batch in batches]
    eager = eager_predictions(devices, cases)
    runs = [run for name in devices for run in predict(name, cases, cache, emulated, kind)]
    console = wide_console()
    for run in runs:
        console.print(report.kernels(run))
    found = report.collect(runs, eager, report.EMULATED if emulated else report.TRACED, kind, recompute)
    console.print(report.summary(found))
    for line in (*report.targets(found), *report.failures(runs)):
        console.print(line, markup=False, highlight=False)
    if json_file:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    if folder:
        report.write(found, folder)
    return 1 if report.failures(runs) else 0


def eager_predictions(devices: Sequence[str], cases: Sequence[Case]) -> list[report.Eager]:
    """Eager's time by its own model, for every device, batch, kind and phase."""
    found = []
    for case in cases:
        for kind in eager_model.EAGER:
            for phase, operations in zip(("forward", "backward"), eager_model.trace(case, kind), strict=True):
                moved = sum(operation.bytes for operation in operations)
                for name in devices:
                    us = 1e6 * eager_model.seconds(operations, device(name))
                    found.append(report.Eager(name, case.batch, phase, kind, us, len(operations), moved))
    return found
