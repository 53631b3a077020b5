"""`cast-kernels predict --model`: inference and training step of a whole CAST, without the GPU.

There are three ways to run it: eager under autocast, torch.compile, and ours. A kernel's cost is the longest of three
times: its FLOPs at a share of the tensor peak, its bytes at a share of DRAM's bandwidth, and a least time. Library
kernels reach these shares; all three ways have the same. Our kernels cost the time of their trace if that is longer.
Predicted, never measured.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ptx_emulator.predict.devices import Device, device
from ptx_emulator.predict.model import Prediction
from ptx_emulator.triton.driver import offline_driver
from torch._subclasses.fake_tensor import FakeTensorMode

from cast_kernels.evidence import compiled_model, host, whole_report
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.eager_model import DRAM_SHARE, LEAST, TENSOR_SHARE, Ledger, Operation
from cast_kernels.evidence.parts import Model, Part, parts
from cast_kernels.evidence.predict import Keeper, predict_launches
from cast_kernels.evidence.unrun import Unrun

#: Bytes that fused AdamW moves for a float32 parameter: it reads weight, gradient and two moments, and writes three.
_ADAMW_BYTES = 28
#: Costs that no fusion of ours can change: the library's products and attention, and the optimizer's bytes.
FIXED = ("products", "attention", "optimizer")


@dataclass(frozen=True)
class Row:
    """Kernels of one kind in one part of the model, over all of its blocks. Times are microseconds."""

    part: str
    phase: str  # "forward" or "backward"
    kind: str  # "products", "attention", "elementwise", "optimizer", or "ours"
    kernels: int
    flops: float
    bytes: float
    us: float
    bound: float  # for ours the time of the launches' trace alone; else equal to `us`


@dataclass(frozen=True)
class WayToRun:
    """One way to run one model on one device."""

    device: str
    model: Model
    name: str  # "eager AMP", "torch.compile", "ours"
    rows: tuple[Row, ...]
    host_us: float
    failures: tuple[str, ...] = ()  # launches that no multiprocessor could hold

    @property
    def us(self) -> float:
        """GPU time."""
        return sum(row.us for row in self.rows)

    @property
    def kernels(self) -> int:
        return sum(row.kernels for row in self.rows)

    def of(self, *kinds: str) -> float:
        """GPU time of these kinds."""
        return sum(row.us for row in self.rows if row.kind in kinds)

    @property
    def without_graphs(self) -> float:
        """The larger of GPU and host time."""
        return max(self.us, self.host_us)

    @property
    def with_graphs(self) -> float:
        """The same if the host replays a CUDA graph."""
        return max(self.us, host.GRAPH)


def predict(names: Sequence[str], models: Sequence[Model], cache: Path | None = None) -> Iterator[WayToRun]:
    """Every way to run each model, on every device."""
    for model in models:
        yield from _eager(names, model)
        yield from _compiled(names, model)
        for name in names:
            yield _ours(device(name), model, cache)


def operations(model: Model, backend: str = "eager") -> Iterator[tuple[Part, str, list[Operation]]]:
    """PyTorch's launches by part and phase, traced on tensors without memory, without the optimizer's."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in parts(model, backend):
            ledger = Ledger()
            for phase in _phases(part, ledger, model.training):
                yield part, phase, ledger.take()


def _phases(part: Part, ledger: Ledger, training: bool) -> Iterator[str]:
    """Run forward, then backward; the caller takes the launches after each."""
    with nullcontext() if training else torch.no_grad(), ledger:
        outputs = part.forward(torch.bfloat16)
    yield "forward"
    if training:
        with ledger:
            part.backward(outputs)
        yield "backward"


def _eager(names: Sequence[str], model: Model) -> Iterator[WayToRun]:
    traced = list(operations(model))
    count = sum(part.times * len(found) for part, _, found in traced)
    trained = sum(part.trained for part, phase, _ in traced if phase == "forward")
    for name in names:
        rows = [row for part, phase, ops in traced for row in _rows(part.name, phase, Counter(ops), part.times, name)]
        rows += _optimizer(trained, model, name)
        yield WayToRun(name, model, "eager AMP", tuple(rows), host.interpreted_us(count, 0))


def _compiled(names: Sequence[str], model: Model) -> Iterator[WayToRun]:
    counted = compiled_model.count(model)
    kernels = sum(sum(found.values()) for found in counted.values())
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained = sum(part.trained for part in parts(model, "eager"))
    for name in names:
        rows = [row for phase, found in counted.items() for row in _rows("all", phase, found, 1, name)]
        rows += _optimizer(trained, model, name)
        yield WayToRun(name, model, "torch.compile", tuple(rows), host.COMPILED * kernels)


def _optimizer(trained: int, model: Model, name: str) -> list[Row]:
    """The length of the gradient, and fused AdamW: few launches, each over many tensors."""
    found = Counter([Operation("gradient length", 0, 4 * trained), Operation("fused AdamW", 0, _ADAMW_BYTES * trained)])
    return list(_rows("optimizer", "backward", found, 1, name)) if model.training else []


def _rows(part: str, phase: str, found: Mapping[Operation, int], times: int, name: str) -> Iterable[Row]:
    goal = device(name)
    for kind in dict.fromkeys(operation.kind for operation in found):
        own = {operation: times * count for operation, count in found.items() if operation.kind == kind}
        us = 1e6 * sum(count * operation.seconds(goal) for operation, count in own.items())
        label = "optimizer" if part == "optimizer" else kind
        flops, moved = (sum(n * getattr(o, what) for o, n in own.items()) for what in ("flops", "bytes"))
        yield Row(part, phase, label, sum(own.values()), flops, moved, us, us)


def _ours(goal: Device, model: Model, cache: Path | None) -> WayToRun:
    """Our way: PyTorch's operators from the ledger, our launches compiled and traced."""
    rows: list[Row] = []
    failures: dict[str, None] = {}
    operators = launched = trained = 0
    with offline_driver(goal.target, Keeper(), cache) as keeper:
        for part in parts(model, "triton"):
            ledger, trained = Unrun(), trained + part.trained
            for phase in _phases(part, ledger, model.training):
                found, launches = Counter(ledger.take()), keeper.take()
                rows += _rows(part.name, phase, found, part.times, goal.name)
                predicted = predict_launches(launches, goal)
                rows += _launched(part, phase, predicted, goal)
                failures |= {f"{goal.name} {p.kernel}: {p.why_not}": None for p in predicted if p.why_not}
                operators += part.times * sum(found.values())
                launched += part.times * len(launches)
    rows += _optimizer(trained, model, goal.name)
    return WayToRun(goal.name, model, "ours", tuple(rows), host.interpreted_us(operators, launched), tuple(failures))


def _launched(part: Part, phase: str, launches: Sequence[Prediction], goal: Device) -> list[Row]:
    """The launches of one part, a row for each kernel; the row's `part` is the op and the kernel."""
    found: dict[str, list[Prediction]] = {}
    for one in launches:
        found.setdefault(one.kernel, []).append(one)
    return [
        Row(
            f"{part.name}: {kernel}", phase, "ours", part.times * len(all_of_it),
            part.times * sum(p.flops for p in all_of_it), part.times * sum(p.dram_bytes for p in all_of_it),
            part.times * sum(charged(p, goal) for p in all_of_it), part.times * sum(p.us for p in all_of_it),
        )
        for kernel, all_of_it in found.items()
    ]  # fmt: skip


def charged(launch: Prediction, goal: Device) -> float:
    """Microseconds of one of our launches: its trace's, or the rule's for PyTorch's kernels if that is more."""
    roofline = max(launch.flops / (TENSOR_SHARE * goal.peak), launch.dram_bytes / (DRAM_SHARE * goal.dram), LEAST)
    return max(launch.us, 1e6 * roofline)


def both(batches: Sequence[int], recompute: str, streams: Sequence[str]) -> list[Model]:
    """Inference and a training step at each batch size, with streams of each dtype."""
    base = [Model(batch=batch, training=training, recompute=recompute, streams=kind)
            for kind in streams for training in (False, True) for batch in batches]  # fmt: skip
    return [replace(one, drop_path=one.drop_path if one.training else 0.0) for one in base]


def as_json(way: WayToRun) -> dict[str, Any]:
    """One way with all its rows, as JSON values."""
    return {
        "device": way.device, "model": asdict(way.model), "way": way.name, "gpu_us": way.us, "host_us": way.host_us,
        "kernels": way.kernels, "fixed_us": way.of(*FIXED), "without_graphs_us": way.without_graphs,
        "with_graphs_us": way.with_graphs, "failures": list(way.failures), "rows": [asdict(row) for row in way.rows],
    }  # fmt: skip


def main(
    devices: Sequence[str], batches: Sequence[int], json_file: Path | None, folder: Path | None, cache: Path | None,
    recompute: str, streams: Sequence[str],
) -> int:  # fmt: skip
    """Predict, print, write, and return the exit code: 1 if a kernel does not fit a device.

    Args:
        devices: names.
        batches: clips.
        json_file: file for everything as JSON.
        folder: folder for a JSON file of each GPU, and README.md.
        cache: folder of compiled kernels for reuse, None for a temporary one.
        recompute: level of ours.
        streams: keys of :data:`~cast_kernels.evidence.cases.STREAMS`.
    """
    console = wide_console()
    ways = [as_json(way) for way in predict(devices, both(batches, recompute, streams), cache)]
    console.print(whole_report.summary(ways))
    failures = [f"FAIL  {line}" for way in ways for line in way["failures"]]
    for line in (*whole_report.goals(ways), *dict.fromkeys(failures)):
        console.print(line, markup=False, highlight=False)
    if json_file:
        json_file.write_text(json.dumps(ways, indent=1) + "\n")
    if folder:
        command = f"cast-kernels predict --model --recompute {recompute} --streams {' '.join(streams)} --folder"
        whole_report.write(ways, folder, command, str(datetime.date.today()))
    return 1 if failures else 0
