"""CAST-B/16 whole, on the CPU: inference, a training step and its peak memory, beside what a user would run instead.

    pytest benchmarks/ --benchmark-only -k model

A row's speed-up is taken against `fused=False` of the same group, and shown only if every result (logits, and in
training every gradient) is within twice that row's error against fp64. All weights are random, nothing is zero.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from compare import Candidate, compare
from measure import Unavailable
from models import Training, config_of, count_flops, exact_logits, exact_training, make_batch, make_model
from peak_memory import measure_apart
from peers import onnx_runtime, openvino
from report import recorded_time, replay
from torch import Tensor

VARIANT = "base"
BASELINE = "fused=False"
COMPILED = "torch.compile(fused=False)"
OPENVINO, ONNX = "OpenVINO f32", "ONNX Runtime f32"
#: Rows that are a plain model: name -> arguments of `cast.CAST`.
UNFUSED: dict[str, dict[str, Any]] = {BASELINE: {"fused": False}}
FUSED: dict[str, dict[str, Any]] = {"fused=True": {"fused": True}}
RECOMPUTE = {f"fused=True, recompute={r}": {"fused": True, "recompute": r} for r in ("nothing", "all")}
PLAIN = UNFUSED | FUSED | RECOMPUTE

#: Group -> its rows, in the order of the table.
GROUPS = {
    "inference fp32 B=1": [BASELINE, COMPILED, *FUSED, OPENVINO, ONNX],
    "inference bf16 B=1": [BASELINE, *FUSED],
    "training step fp32 B=1": [BASELINE, COMPILED, *FUSED, *RECOMPUTE],
    "training memory fp32 B=2": [*PLAIN],
}
#: Samples of each row, at most, and seconds for all samples of a group.
SAMPLES, GROUP_SECONDS = 9, 70.0


def inference(name: str, video: Tensor, dtype: torch.dtype = torch.float32) -> Candidate:
    model = make_model(VARIANT, **PLAIN.get(name, {"fused": False}))
    run: Any
    if name in (OPENVINO, ONNX):
        run = (openvino if name == OPENVINO else onnx_runtime)(model, video, torch.get_num_threads())
    else:
        call: Any = torch.compile(model, dynamic=False) if name == COMPILED else model
        run = partial(infer, call, video, dtype)
    return Candidate(run, run)


@torch.no_grad()
def infer(call: Any, video: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return call(video)


def training(name: str, video: Tensor, labels: dict[str, Tensor]) -> Candidate:
    model = make_model(VARIANT, **PLAIN.get(name, {"fused": False}))
    call = torch.compile(model, dynamic=False) if name == COMPILED else None
    run = Training(model, video, labels, call)
    return Candidate(run.step, run.results)


@lru_cache(1)
def inputs(batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    return make_batch(config_of(VARIANT), batch)


@lru_cache(1)
def logits_in_fp64() -> dict[str, Tensor]:
    return exact_logits(VARIANT, inputs(1)[0])


@lru_cache(1)
def measure_group(group: str) -> dict[str, dict[str, Any]]:
    """All rows of one group: name -> row of the table."""
    torch._dynamo.reset()
    names = GROUPS[group]
    if "memory" in group:
        return compare_memory(names, batch=2)
    video, labels = inputs(1)
    if group.startswith("training"):
        builders = {name: partial(training, name, video, labels) for name in names}
        exact, flops = exact_training(VARIANT, video, labels), count_flops(VARIANT, 1, training=True)
    else:
        dtype = torch.bfloat16 if "bf16" in group else torch.float32
        builders = {name: partial(inference, name, video, dtype) for name in names}
        exact, flops = logits_in_fp64(), count_flops(VARIANT, 1)
    return compare(builders, exact, BASELINE, flops, SAMPLES, GROUP_SECONDS)


def compare_memory(names: list[str], batch: int) -> dict[str, dict[str, Any]]:
    """Peak memory of two training steps; their gradients are what the group of training steps checks."""
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            row = measure_apart(VARIANT, batch, PLAIN[name])
        except Unavailable as reason:
            rows[name] = {"missing": str(reason)}
            continue
        rows[name] = row | {"above_mib": row["peak_mib"] - row["before_mib"]}
    first = rows[names[0]]
    for row in rows.values():
        if "missing" not in row and "missing" not in first:
            row["peak_share"] = row["peak_mib"] / first["peak_mib"]
            row["above_share"] = row["above_mib"] / first["above_mib"]
    return rows


@pytest.mark.timeout(3600)
@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in GROUPS.items() for name in names])
def test_model(group: str, name: str, benchmark: Any, report: Any) -> None:
    """One row of its group's interleaved run."""
    row = measure_group(group)[name]
    report.add(f"model {group}: CAST-B/16, heads 97 + 300", name, row)
    benchmark.group = f"model {group}"
    replay(benchmark, row)
    if "missing" in row:
        pytest.skip(row["missing"])
    if (
        name in FUSED | RECOMPUTE and "correct" in row
    ):  # peers may miss the bound and then show no speed-up; we must not
        assert row["correct"], f"{name}: error is {row['worst_error_over_eager']:.2f} times that of {BASELINE}"
