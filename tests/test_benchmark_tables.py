"""What a table of the benchmarks shows: spreads, predictions of the same GPU and problem, every figure whole."""

from __future__ import annotations

import io
from typing import Any

import prediction
import pytest
import report
from measure import CpuMachine
from report import render
from rich.console import Console

from cast_kernels.gpu.rows import MODES


def test_a_column_without_figures_is_left_out() -> None:
    table = render("group", {"a": {"peak_mib": 2.0}})
    Console(quiet=True).print(table)
    assert [str(column.header).split() for column in table.columns] == [["variant"], ["peak", "MiB"]]


def test_no_figure_is_shown_without_its_spread_and_none_of_what_was_stood_in_for() -> None:
    row: dict[str, Any] = {}
    for number, mode in enumerate(MODES, 2):
        row |= {f"{mode}median_ms": 2.0, f"{mode}spread_ms": [1.5, 4.0], f"{mode}all_ms": [2.0] * number}
        row |= {f"{mode}speedup": 1.25, f"{mode}speedup_spread": [1.1, 1.4]}
    rows = {"eager": row, "stand-in": row | {"stand_in": "an emulated device"}, "not there": {"missing": "pip"}}
    columns = render("group", rows).columns
    cells = {" ".join(str(column.header).split()): [str(cell) for cell in column.cells] for column in columns}
    assert cells.pop("ms (spread)") == ["2 (1.5..4)", "stand-in", "missing"]
    for way in ("cold L2 ms", "graph ms", "graph, cold L2 ms"):
        assert cells.pop(f"{way} (spread)") == ["2 (1.5..4)", "stand-in", ""]
    for way in ("speed-up", "graph speed-up"):
        assert cells.pop(f"{way} (spread)") == ["1.25 (1.10..1.40)", "stand-in", ""]
    assert cells.pop("samples") == ["2, 3, 4, 5", "stand-in", ""]
    assert cells.keys() == {"variant"}  # there is no other figure


class H100(CpuMachine):
    def describe(self) -> dict[str, Any]:
        return {"name": "NVIDIA H100 80GB HBM3", "multiprocessors": 132}


def test_predictions_are_of_the_same_gpu_problem_and_work() -> None:
    machine: Any = H100()
    (inference,) = prediction.predicted(machine, "cuda", "bf16", 6, "inference").values()
    found = prediction.predicted(machine, "cuda", "bf16", 6, "training")
    assert found["cast_kernels, triton, recompute=cheap"] > found["cast_kernels, triton"] > inference > 0
    under_autocast = prediction.predicted(machine, "cuda", "amp", 6, "training")
    assert under_autocast["cast_kernels, triton"] > found["cast_kernels, triton"]
    assert prediction.predicted(machine, "cuda", "fp16", 6, "training") == {}
    assert prediction.predicted(machine, "cuda", "bf16", 7, "training") == {}
    assert prediction.predicted(machine, "cpu", "bf16", 6, "training") == {}
    step = prediction.predicted_model(machine, "cuda", "amp", 6, "training step")
    inferring = prediction.predicted_model(machine, "cuda", "amp", 6, "inference")
    eager = {"fused=False", "torch.compile(fused=False)"}
    assert step.keys() == inferring.keys() == {*eager, "cast_kernels, triton"}
    assert all(step[name] > inferring[name] > 0 for name in eager)
    assert prediction.predicted_model(machine, "cuda", "bf16", 6, "inference") == {}
    assert prediction.predicted_model(machine, "cuda", "amp", 6, "training memory") == {}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("NVIDIA GeForce RTX 4090", 128),
        ("NVIDIA GH200 480GB", 132),
        ("NVIDIA H100 PCIe", 114),
        ("NVIDIA H100 NVL", 132),
    ],
)
def test_another_gpu_has_no_prediction(name: str, count: int) -> None:
    gpu = {"name": name, "multiprocessors": count}
    assert prediction.prediction_of(gpu, prediction.PREDICTIONS / "bf16/cheap") == {}
    assert prediction.prediction_of(gpu, prediction.PREDICTIONS / "model") == {}


def test_no_figure_is_cut_off_however_many_columns_there_are() -> None:
    row: dict[str, Any] = {"kept_mib": 123.4, "peak_mib": 812.0, "of_ceiling": 0.2, "of_copy": 0.5, "predicted_ms": 1.2}
    for mode in ("", "cold_", "graph_", "graph_cold_"):
        row |= {f"{mode}median_ms": 1.2345678, f"{mode}spread_ms": [1.2222, 1.3333]}
        row |= {f"{mode}speedup": 1.25, f"{mode}speedup_spread": [1.111, 1.444]}
    console = Console(width=report._WIDEST, record=True, quiet=False, file=io.StringIO())
    console.print(render("group", {"eager, tuned (SDPA) by flash-attn": row}))
    text = console.export_text()
    assert text.count("1.235 (1.222..1.333)") == 4
    assert text.count("1.25 (1.11..1.44)") == 2
    assert "…" not in text
