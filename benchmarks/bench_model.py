"""CAST-B/16 whole: inference, a training step and its peak memory, beside the alternatives.

    pytest benchmarks/ --benchmark-only -k model

A row's speed-up is relative to `fused=False` of the same group. It is shown only if each result (logits, and in
training each gradient) has at most twice that row's error against fp64. All weights are random; none is zero. On a GPU
a training step is forward, loss, backward and a fused AdamW, and the errors are those of up to six of its clips.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from groups import GPU_BATCHES, KINDS, Candidate, First, Group, Kind, Row, Sizes, Work
from models import Training, count_flops, exact_logits, exact_training, make_batch, make_model
from peak_memory import measure_apart
from peers import onnx_runtime, openvino
from prediction import predicted_model
from report import recorded_time
from torch import Tensor
from variants import PACKAGES, attending, attentions, compiled, is_second, options_of, ours, package_attention

import cast
from cast_kernels.gpu.machine import Machine

BASELINE = "fused=False"
COMPILED = "torch.compile(fused=False)"
OPENVINO, ONNX = "OpenVINO f32", "ONNX Runtime f32"
EXPORTED: dict[str, Callable[..., Any]] = {OPENVINO: openvino, ONNX: onnx_runtime}

#: Device -> (work, kind, clips) of its groups.
PROBLEMS = {
    "cpu": [
        ("inference", "fp32", 1), ("inference", "amp", 1), ("training step", "fp32", 1), ("training memory", "fp32", 2),
    ],
    "cuda": [
        (work, kind, batch)
        for batch in GPU_BATCHES
        for kind in KINDS
        for work in ("inference", "training step", "training memory")
        if not (kind == "fp16" and work != "inference")  # fp16 would need a scaler in training
    ],
}  # fmt: skip
#: Groups of tier `first`.
FIRST = {
    ("training step", "amp", 6): First(10, levels=("cheap",)),
    ("inference", "amp", 1): First(15),
    ("training memory", "amp", 6): First(20, levels=("all",)),
    ("inference", "amp", 6): First(25),
    ("training step", "amp", 1): First(65),
}
#: Clips whose results are compared with fp64; more would not fit into the memory.
CHECKED = 6


def groups(device: str, sizes: Sizes) -> list[Group]:
    """Every group of a device."""
    found = []
    for work, kind, batch in PROBLEMS[device]:
        rows = row_names(device, work, KINDS[kind])
        name = f"model {work} {kind} B{batch}"
        make = partial(make_work, device, sizes, work, KINDS[kind], batch, rows)
        later = tuple(row for row in rows if is_second(row) or (work == "training memory" and row.endswith("cuda")))
        title = f"{name}: CAST-B/16, heads 97 + 300"
        found.append(Group(name, title, rows, make, FIRST.get((work, kind, batch)), later))
    return found


def row_names(device: str, work: str, kind: Kind) -> tuple[str, ...]:
    mine = tuple(ours(device, work != "inference", kind.compute))
    if work == "training memory":
        return (BASELINE, *mine)
    peers = (COMPILED, *(f"{BASELINE} by {name}" for name in attentions(device, kind.compute)))
    if device == "cpu" and kind.autocast is not None:
        peers = ()  # compiling takes minutes, and PyTorch's CPU code is slow for this kind
    exported = tuple(EXPORTED) if (device, work, kind.name) == ("cpu", "inference", "fp32") else ()
    return (BASELINE, *peers, *mine, *exported)


def build_model(name: str, sizes: Sizes, kind: Kind, device: torch.device) -> tuple[cast.CAST, Callable[..., Any]]:
    """The model and the function to call; all rows have the same weights."""
    options = dict(options_of(name, device) or {"backend": "eager"})
    backend = options.pop("backend")
    model = make_model(sizes.variant, device, **sizes.model, **options).fuse(backend).to(kind.dtype)
    attention = name.partition(" by ")[2]
    if attention in PACKAGES:
        package_attention(attention)
        return model.unfuse(attention), model
    if name == COMPILED:
        return model, compiled(model)
    context = attending(attention)

    def call(video: Tensor) -> Any:
        with context():
            return model(video)

    return model, call


def inference(name: str, sizes: Sizes, kind: Kind, batch: int, device: torch.device) -> Candidate:
    model, call = build_model(name, sizes, kind, device)
    video = make_batch(model.config, sizes.clips(batch), device, kind.dtype)[0]
    if name in EXPORTED:
        run = EXPORTED[name](model, video, torch.get_num_threads())
        return Candidate(run, run)

    @torch.no_grad()
    def infer(clips: int | None = None) -> dict[str, Tensor]:
        with kind.context(device):
            return call(video[:clips])  # type: ignore[no-any-return]

    return Candidate(infer, partial(infer, CHECKED))


def training(
    name: str, sizes: Sizes, kind: Kind, batch: int, device: torch.device, in_graph: bool = False
) -> Candidate:
    model, call = build_model(name, sizes, kind, device)
    run = Training(model, *make_batch(model.config, sizes.clips(batch), device, kind.dtype), call, kind, in_graph)
    return Candidate(run.step, partial(run.results, CHECKED))


@lru_cache(1)
def exact(sizes: Sizes, kind: Kind, batch: int, device: torch.device, train: bool) -> dict[str, Tensor]:
    """Logits, and gradients, in fp64 on the device, from weights and video rounded to the kind's dtype."""
    model = make_model(sizes.variant, device, **sizes.model).to(kind.dtype)
    video, labels = make_batch(model.config, sizes.clips(batch), device, kind.dtype)
    if train:
        return exact_training(model, video[:CHECKED], {name: x[:CHECKED] for name, x in labels.items()})
    return exact_logits(model, video[:CHECKED])


def make_work(
    device: str, sizes: Sizes, work: str, kind: Kind, batch: int, rows: tuple[str, ...], machine: Machine
) -> Work:
    train = work != "inference"
    candidate: Callable[..., Candidate] = partial(training, in_graph=device == "cuda") if train else inference
    if work == "training memory" and device == "cpu":
        candidate = memory_apart  # resident memory belongs to the whole process
    return Work(
        builders={name: partial(candidate, name, sizes, kind, batch, machine.device) for name in rows},
        exact=None if work == "training memory" else partial(exact, sizes, kind, batch, machine.device, train),
        flops=partial(count_flops, sizes.variant, sizes.clips(batch), train, **sizes.model),
        kind=kind,
        samples={"cpu": 9, "cuda": 20}[device],
        seconds={"cpu": 70.0, "cuda": 15.0}[device],
        memory_alone=work == "training memory",
        predicted=predicted_model(machine, device, kind.name, batch, work) if sizes.name == "paper" else {},
    )


def memory_apart(name: str, sizes: Sizes, kind: Kind, batch: int, device: torch.device) -> Candidate:
    """Peak memory of two training steps in a separate process. The group of training steps checks the gradients."""
    arguments = options_of(name, device) or {"backend": "eager"}
    found = measure_apart(sizes.variant, sizes.clips(batch), {**sizes.model, **arguments})
    return Candidate(lambda: None, dict, figures=found | {"above_mib": found["peak_mib"] - found["before_mib"]})


@pytest.mark.timeout(3600)
@pytest.mark.benchmark(timer=recorded_time)
def test_model(row: Row, measure: Callable[[Row], None]) -> None:
    """One row of its group's interleaved run."""
    measure(row)
