"""The report of `cast-kernels gpu-check`, on a machine whose times are known, from kernels that run in emulation."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_cases import needs_kernels
from fake_machine import FakeMachine
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Recorder, offline_driver
from ptx_emulator.triton.launcher import Emulator

from cast_kernels.cli import main
from cast_kernels.evidence.cases import Case, run
from cast_kernels.evidence.cuda_launches import emulated, kept
from cast_kernels.evidence.experts import ExpertCase
from cast_kernels.gpu import check as gpu_check
from cast_kernels.gpu import report as gpu_report
from cast_kernels.gpu.ceilings import ceilings
from cast_kernels.gpu.check import Plan
from cast_kernels.gpu.machine import UnusableError

SMALL = Case(2, 2, 5, 32, 32, 2)
PLAN = Plan((SMALL,), ("bf16",))
EXPERTS = tuple(ExpertCase(20, 32, 48, 16, scaled=True, op=op, heads=2) for op in ("ffn", "self_attention", "adapter"))
RIGHT = {"backend": "triton", "ok": True, "same_bits_twice": True}
ROWS = {
    "ceilings": {"copy_bytes_per_s": 3e12}, "broken": "",
    "groups": {
        "bcast bf16 B1 training: 768/384": {
            "eager, published code": {"median_ms": 8.0, "spread_ms": [7.0, 9.0], "all_ms": [7.0, 8.0, 9.0]},
            "cast_kernels, triton": {
                "median_ms": 4.0, "spread_ms": [3.9, 4.1], "all_ms": [4.0, 4.0, 4.0], "graph_median_ms": 1.3,
                "graph_spread_ms": [1.2, 1.4], "speedup": 2.0, "speedup_spread": [1.8, 2.3], "correct": True,
                "predicted_ms": 1.0,
            },
            "eager by flash-attn": {"missing": "pip install flash-attn"},
        }
    },
}  # fmt: skip


def benchmarks(found: dict[str, Any] = ROWS) -> Any:
    """What stands in for the process that measures: it leaves these rows."""

    def run(plan: Plan, rows: Path) -> int:
        rows.write_text(json.dumps(found))
        return 0

    return run


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these tests are about a machine without a GPU")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.mark.parametrize("command", ["gpu-check", "tune"])
def test_without_a_gpu_it_says_so_and_exits_with_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no CUDA device can be used" in captured.err
    assert captured.err.count("\n") == 1


def test_ceilings_count_bytes_twice_and_flops_as_two() -> None:
    found = dict(ceilings(FakeMachine(lambda: 0.5), 5, 1 << 10, 16))
    assert found["copy_bytes_per_s"] == 2 * 1024 / 0.5e-3
    assert found["gemm_flops_per_s"] == found["gemm_fp32_flops_per_s"] == 2 * 16**3 / 0.5e-3


@pytest.mark.parametrize(
    ("correct", "sanitizer"),
    [
        ([], []),
        ([{"backend": "cpu", "ok": True, "same_bits_twice": True}], []),
        ([{"backend": "triton", "ok": False, "same_bits_twice": True}], []),
        ([{"backend": "triton", "ok": True, "same_bits_twice": False}], []),
        ([{"backend": "triton", "ok": True, "same_bits_twice": True}], [{"ok": False}]),
    ],
)
def test_what_fails_the_check(correct: list[dict[str, Any]], sanitizer: list[dict[str, Any]]) -> None:
    assert not gpu_check.passed({"correctness": correct, "sanitizer": sanitizer, "times": ROWS, "broken": []})


@pytest.mark.parametrize(
    ("name", "row", "code", "verdict"),
    [
        ("eager by flash-attn", {"missing": "pip install flash-attn"}, 0, "all is right"),
        ("cast_kernels, triton", {"median_ms": 1.0}, 0, "all is right"),
        ("cast_kernels, triton", {"missing": "out of memory"}, 3, "rows of ours were not measured in: a group; please"),
        ("cast_kernels, triton", {"missing": "not begun: 5 minutes"}, 3, "rows of ours were not measured in: a group"),
        ("cast_kernels, triton", {"failed": "KeyError: 'x'"}, 1, "FAIL"),
        ("cast_kernels, triton", {"correct": False}, 1, "FAIL"),
    ],
)
def test_what_a_row_means_for_the_check(name: str, row: dict[str, Any], code: int, verdict: str) -> None:
    """What raises or is wrong fails it; all is right only where everything of ours was measured."""
    found = {"correctness": [RIGHT], "sanitizer": [], "times": {"groups": {"a group": {name: row}}}, "broken": []}
    assert gpu_check.status(found) == code
    assert verdict in gpu_report.verdict(found, gpu_check.passed(found))


def test_rows_of_ours_that_were_not_measured_are_in_the_report(tmp_path: Path, cache: Path) -> None:
    late = {
        "cast_kernels, triton": {"missing": "not begun: the 5 minutes were over"},
        "eager": {"missing": "not begun"},
    }
    files = tmp_path / "found.json", tmp_path / "found.md"
    with offline_driver(target("sm_80"), Emulator(), cache):
        groups = {**ROWS["groups"], "a late group": late}  # type: ignore[dict-item]
        code = gpu_check.check(FakeMachine(), PLAN, *files, 5, benchmarks({**ROWS, "groups": groups}))
    assert code == 3
    text = files[1].read_text()
    assert "| a late group | cast_kernels, triton | not begun: the 5 minutes were over |" in text
    assert text.rstrip().endswith("rows of ours were not measured in: a late group; please send the report")


@pytest.mark.parametrize(("status", "good"), [(0, True), (1, True), (2, False), (-9, False)])
def test_benchmarks_that_were_ended_fail_the_check(status: int, good: bool) -> None:
    found = {"correctness": [RIGHT], "sanitizer": [], "times": ROWS | {"status": status}, "broken": [], "device": {}}
    assert gpu_check.passed(found) == good
    sections = str(gpu_report.sections(found | {"correctness": []}))
    assert (f"the benchmarks ended with exit status {status}" in sections) == (not good)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "five"])
def test_minutes_that_are_none_are_refused(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gpu-check", "--minutes", minutes])
    assert f"{minutes!r} is not a number above zero" in capsys.readouterr().err


def test_equal_bits_are_demanded_of_what_is_ours_alone() -> None:
    """PyTorch's attention adds its gradients up in any order on a GPU."""
    other = {"ok": True, "same_bits_twice": False}
    assert not gpu_report.is_right(other | {"bits_demanded": True})
    assert gpu_report.is_right(other | {"bits_demanded": False})
    assert [
        gpu_check._attends_by_pytorch(case, backend) for case in (SMALL, *EXPERTS) for backend in ("triton", "cpu")
    ] == [False, False, False, False, True, False, False, False]


def test_a_whole_report_from_emulated_kernels(tmp_path: Path, cache: Path) -> None:
    machine = FakeMachine()
    machine.findings = {"memcheck": (True, "ERROR SUMMARY: 0 errors")}
    plan = replace(PLAN, experts=EXPERTS[:2])
    json_file, report = tmp_path / "found.json", tmp_path / "found.md"
    with offline_driver(target("sm_80"), Emulator(), cache):
        code = gpu_check.check(machine, plan, json_file, report, 5, benchmarks())
    found = json.loads(json_file.read_text())
    triton = [entry for entry in found["correctness"] if entry["backend"] == "triton"]
    assert [entry["ok"] for entry in triton] == [True] * 3
    assert all(entry["same_bits_twice"] for entry in triton)
    assert [entry["bits_demanded"] for entry in triton] == [True, True, False]
    assert [entry["tensors"] for entry in triton[1:]] == [1 + 1 + 10, 1 + 1 + 10]
    assert triton[0]["rms"] <= 2 * triton[0]["eager_rms"]
    assert triton[0]["tensors"] == 2 + 2 + 28
    assert code == 0
    assert "all_ms" not in json_file.read_text()
    assert "all_ms" in (tmp_path / "found.rows.json").read_text()
    text = report.read_text()
    assert text.startswith("# cast_kernels ")
    for part in ("NVIDIA H100", "memcheck | ok", "| triton | bf16 |", "4 (3.9..4.1)", "2.00 (1.80..2.30)", "3.00 T/s",
                 "missing: pip install flash-attn", "| 1.300 | 1.000 | 1.30 | yes |"):  # fmt: skip
        assert part in text


class DyingMachine(FakeMachine):
    """A GPU on which a kernel faults at the n-th measured time: CUDA refuses every later call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def elapsed_ms(self, step: Any) -> float:
        self.calls -= 1
        self.synchronise()
        return super().elapsed_ms(step)

    def synchronise(self) -> None:
        if self.calls < 0:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")


def test_what_was_found_before_the_device_died_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benchmarks run in a process of their own, so they have a GPU again."""
    monkeypatch.chdir(tmp_path)
    assert gpu_check.check(DyingMachine(-1), PLAN, None, None, 5, benchmarks()) == 1
    found = json.loads((tmp_path / "gpu-check-nvidia-h100-80gb-hbm3.json").read_text())
    assert [b["section"] for b in found["broken"]] == ["correctness"]
    assert found["times"]["groups"].keys() == ROWS["groups"].keys()
    text = (tmp_path / "gpu-check-nvidia-h100-80gb-hbm3.md").read_text()
    assert "illegal memory access" in text
    assert "FAIL" in text
    assert "gpu-check-nvidia-h100-80gb-hbm3.md" in capsys.readouterr().out


def test_a_section_that_raises_is_in_the_report_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_resources(*_: Any) -> Any:
        yield {"backend": "cpu", "ok": True, "same_bits_twice": True, "dtype": "bf16", "case": "one", "worst": "x",
               "rms": 0.0, "eager_rms": 0.0}  # fmt: skip
        raise MemoryError("shared memory")

    saved = []
    monkeypatch.setattr(gpu_check, "correctness", out_of_resources)
    found = gpu_check.collect(
        FakeMachine(), PLAN, 5, tmp_path / "rows", lambda found: saved.append(json.dumps(found)), benchmarks()
    )
    assert found["broken"] == [{"section": "correctness", "error": "MemoryError: shared memory"}]
    assert len(found["correctness"]) == 1
    assert found["times"]["groups"]
    assert len(json.loads(saved[0])["correctness"]) == 1
    assert json.loads(saved[0])["unfinished"] == [*gpu_check.SECTIONS]
    assert "MemoryError" in saved[1]
    assert not gpu_check.passed(found)


def test_what_raises_is_an_entry_and_the_other_problems_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def running(case: Case, backend: str | None, **rest: Any) -> Any:
        if backend == "cpu" and case.seed == 5:
            raise MemoryError("out of resource: shared memory")
        return run(case, backend, **rest)

    monkeypatch.setattr(gpu_check, "run", running)
    found = list(gpu_check.correctness(FakeMachine(), replace(PLAN, cases=(SMALL, SMALL)), 5))
    first, second = [c for c in found if c["backend"] == "cpu"]
    assert (first["ok"], first["why_not"]) == (False, "MemoryError: out of resource: shared memory")
    assert second["ok"]


def test_a_kernel_that_ends_the_context_ends_the_section_and_is_its_last_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = DyingMachine(0)

    def running(*_: Any, **__: Any) -> Any:
        machine.calls = -1
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_check, "run", running)
    found = gpu_check.correctness(machine, replace(PLAN, cases=(SMALL, SMALL)), 5)
    assert next(found)["backend"] == "triton"  # refused: there is no GPU
    assert next(found)["backend"] == "cuda"  # left out, for the same reason
    assert "illegal memory" in next(found)["why_not"]
    next(found)
    with pytest.raises(UnusableError, match="was not run"):
        next(found)


def test_errors_with_brackets_and_bars_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(plan: Plan, rows: Path) -> int:
        raise ValueError("[/rows] |\nmore")

    monkeypatch.chdir(tmp_path)
    assert gpu_check.check(FakeMachine(), PLAN, None, None, 5, broken) == 1
    assert "[/rows]" in capsys.readouterr().out
    (report,) = tmp_path.glob("*.md")
    assert "| ValueError: [/rows] \\| more |" in report.read_text()


def test_the_benchmarks_go_on_after_a_fault_for_as_long_as_they_bring_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault ends one process; the next leaves out what is known, and one that brings nothing new is the last."""
    rows, commands = tmp_path / "rows.json", []
    ends = iter([{"a": {}}, {"a": {}, "b": {}}, {"a": {}, "b": {}}])

    def process(command: list[str], **_: Any) -> Any:
        commands.append(command)
        rows.write_text(json.dumps({"broken": "illegal memory access", "groups": {"group": next(ends)}}))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", process)
    assert gpu_check.run_benchmarks(replace(PLAN, minutes=8), rows) == 1
    assert ["--resume" in command for command in commands] == [False, True, True]
    minutes = [float(command[command.index("--minutes") + 1]) for command in commands]
    assert 7.9 < minutes[2] <= minutes[1] <= minutes[0] <= 8
    first = commands[0]
    assert first[first.index("--device") + 1 : first.index("--device") + 4] == ["cuda", "--tier", "first"]


def test_benchmarks_that_hang_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "BENCHMARKS", tmp_path / "benchmarks")
    hang = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert gpu_check._status(hang, 0.2) < 0
    assert gpu_check._status([sys.executable, "-c", "raise SystemExit(3)"], math.inf) == 3


def test_without_a_checkout_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "BENCHMARKS", tmp_path / "nowhere")
    found = gpu_check.collect(FakeMachine(), replace(PLAN, cases=()), 5, tmp_path / "rows", lambda found: None)
    assert "run this command from a checkout" in found["broken"][0]["error"]


def test_benchmarks_that_bring_no_row_are_an_error(tmp_path: Path) -> None:
    found = gpu_check.collect(
        FakeMachine(), replace(PLAN, cases=()), 5, tmp_path / "rows", lambda found: None, benchmarks({"groups": {}})
    )
    assert found["broken"] == [
        {"section": "times", "error": "RuntimeError: the benchmarks ended with status 0 and brought no row"}
    ]


def test_a_report_of_an_unfinished_run_is_no_good_news() -> None:
    right = [{"backend": "triton", "ok": True, "same_bits_twice": True}]
    found = {"correctness": right, "sanitizer": [], "times": ROWS, "broken": []}
    assert gpu_check.passed(found)
    assert not gpu_check.passed(found | {"unfinished": ["times"]})


@pytest.mark.heavy
def test_the_other_expert_ops_in_emulation(cache: Path) -> None:
    plan = replace(PLAN, cases=(), experts=EXPERTS)
    with offline_driver(target("sm_80"), Emulator(), cache):
        checked = [c for c in gpu_check.correctness(FakeMachine(), plan, 5) if c["backend"] == "triton"]
    assert [entry["tensors"] for entry in checked] == [1 + 1 + 10, 1 + 1 + 10, 1 + 2 + 4]
    assert all(entry["ok"] and entry["same_bits_twice"] for entry in checked)
    with offline_driver(target("sm_80"), Recorder(), cache) as recorder:
        exec(gpu_check.SANITIZED.replace("cuda", "cpu"), {})
    adapters = [record for record in recorder.records.values() if record.first.kernel == "adapter_forward"]
    assert len(adapters) == 3


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(tmp_path: Path) -> None:
    good, bad = tmp_path / "found", tmp_path / "nowhere" / "found"
    for files in ((bad, good), (good, bad)):
        with pytest.raises(OSError, match="nowhere"):
            gpu_check.check(DyingMachine(-1), PLAN, *files)
    assert list(tmp_path.iterdir()) == []


def test_kernels_that_write_nothing_fail(cache: Path) -> None:
    """Memory is poisoned: what the recorder leaves unwritten is NaN, not what was there before."""
    with offline_driver(target("sm_80"), Recorder(), cache):
        found = list(gpu_check.correctness(FakeMachine(), PLAN, 5))
    assert [entry["ok"] for entry in found if entry["backend"] == "triton"] == [False]


def test_inputs_differ_from_seed_to_seed() -> None:
    first, second = (list(gpu_check.correctness(FakeMachine(), PLAN, seed)) for seed in (1, 2))
    assert [entry["backend"] for entry in first] == ["triton", "cuda", "cpu"]
    assert "the streams are on cpu" in first[0]["why_not"]
    assert first[2]["rms"] != second[2]["rms"]


def test_what_cuda_leaves_out_is_said_once_a_reason_and_is_no_error() -> None:
    cases = (SMALL, replace(SMALL, bottleneck=192, heads=6), SMALL)
    found = list(gpu_check.correctness(FakeMachine(), Plan(cases, ("bf16", "fp32"), EXPERTS[:1]), 5, ("cuda",)))
    assert [entry["backend"] for entry in found] == ["cuda"] * len(found)
    reasons = [entry["left_out"] for entry in found]
    assert len(reasons) == len(set(reasons))
    assert all(gpu_report.is_right(entry) for entry in found)


@needs_kernels
def test_the_cuda_kernels_are_checked_beside_tritons(cache: Path) -> None:
    """The same problem by both, in emulation; the expert's op, which cuda leaves to triton, is not checked twice."""
    plan = replace(PLAN, cases=(replace(SMALL, bottleneck=192, heads=6),), experts=EXPERTS[:1])
    with emulated():
        found = list(gpu_check.correctness(FakeMachine(), plan, 5, ("cuda",)))
    (entry,) = found
    assert (entry["ok"], entry["same_bits_twice"], entry["tensors"]) == (True, True, 2 + 2 + 28)
    with offline_driver(target("sm_80"), Recorder(), cache), kept():
        found = list(gpu_check.correctness(FakeMachine(), plan, 5, ("triton", "cuda")))
    assert [(entry["backend"], entry["ok"]) for entry in found] == [
        ("triton", False), ("cuda", False), ("triton", False)
    ]  # fmt: skip


@pytest.mark.parametrize(("measured", "inside"), [(1.3, True), (1.5, False), (0.5, False)])
def test_predicted_beside_measured(measured: float, inside: bool) -> None:
    row = {"median_ms": 2.0, "graph_median_ms": measured, "predicted_ms": 1.0}
    (found,) = gpu_report.beside({"group": {"ours": row, "eager": {"median_ms": 3.0}, "missing": {"missing": "no"}}})
    assert (found["measured_ms"], found["ratio"], found["inside"]) == (measured, measured, inside)
    assert gpu_report.beside({"group": {"ours": row | {"stand_in": "an emulated device"}}}) == []
