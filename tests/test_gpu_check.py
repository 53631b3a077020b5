"""The report of `cast-kernels gpu-check`, on a machine whose times are known, from kernels that run in emulation."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_machine import FakeMachine

from cast_kernels.cli import main
from cast_kernels.evidence import cases, experts, gpu_check, gpu_report
from cast_kernels.evidence import machine as machines
from cast_kernels.evidence.cases import Case, run
from cast_kernels.evidence.driver import Recorder, offline_driver
from cast_kernels.evidence.emulator import Emulator
from cast_kernels.evidence.experts import ExpertCase, run_expert
from cast_kernels.evidence.gpu_check import Plan
from cast_kernels.evidence.machine import CudaMachine
from cast_kernels.evidence.targets import target
from cast_kernels.evidence.variants import VARIANTS, AttentionBy

SMALL = Case(2, 2, 5, 32, 32, 2)
PLAN = Plan((SMALL,), ("bf16",), (1, 2), repeats=5, timed=SMALL, copy_bytes=1 << 10, gemm=16)
EXPERTS = tuple(ExpertCase(20, 32, 48, 16, scaled=True, op=op, heads=2) for op in ("ffn", "self_attention", "adapter"))
ATTENDING = ("self-attention by sdpa", "self-attention by xformers")
SOME = {name: VARIANTS[name] for name in ("triton", "eager bf16", "eager AMP", "flash-attn", *ATTENDING)}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these tests are about a machine without a GPU")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


def predictions(folder: Path) -> Path:
    batch = {"batch": 1, "us": {"inference": 1000.0, "forward": 2000.0, "backward": 5000.0}}
    for name, batches in (("H100", [batch]), ("H200", [batch, batch])):
        entry = {"constants": {"multiprocessors": 132}, "batches": batches}
        (folder / f"{name.lower()}.json").write_text(json.dumps({"devices": {name: entry}}))
    return folder


@pytest.mark.parametrize("command", ["gpu-check", "tune"])
def test_without_a_gpu_it_says_so_and_exits_with_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no CUDA device can be used" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("cold", [False, True])
def test_a_median_is_over_the_repeats_after_a_warm_up(cold: bool) -> None:
    times = iter([9.0, 1.0, 2.0, 50.0, 3.0])
    machine, calls = FakeMachine(lambda: next(times)), []
    assert gpu_check.median_ms(machine, lambda: calls.append(1), 5, cold) == 3.0
    assert len(calls) == 3 + 5
    assert machine.log == ["wait", *(["flush", "time"] if cold else ["time"]) * 5]


def test_ceilings_count_bytes_twice_and_flops_as_two() -> None:
    found = gpu_check.ceilings(FakeMachine(lambda: 0.5), PLAN)
    assert found == {"copy_bytes_per_s": 2 * 1024 / 0.5e-3, "gemm_flops_per_s": 2 * 16**3 / 0.5e-3}


def test_every_variant_is_timed_or_says_why_not() -> None:
    found = list(gpu_check.times(FakeMachine(), PLAN, SOME))
    by_name = {name: [t for t in found if t["variant"] == name and t["batch"] == 2] for name in SOME}
    assert [t["phase"] for t in by_name["eager bf16"]] == ["inference", "training"]
    assert "the streams are on cpu" in by_name["triton"][0]["why_not"]
    assert "pip install flash-attn" in by_name["flash-attn"][0]["why_not"]
    assert [t["phase"] for t in by_name["self-attention by sdpa"]] == ["inference", "training"]
    assert "xformers runs on cuda" in by_name["self-attention by xformers"][0]["why_not"]
    one = by_name["eager AMP"][0]
    assert one["warm_ms"] < one["cold_ms"] < one["graph_warm_ms"] < one["graph_cold_ms"]  # the fake's times only rise
    assert one["peak_bytes"] == 3_000_000
    assert not any(t.get("failed") for t in found)


def test_what_cannot_be_captured_has_no_graph_times() -> None:
    found = list(gpu_check.times(FakeMachine(can_capture=False), PLAN, {"eager bf16": VARIANTS["eager bf16"]}))
    assert found[0]["no_graph"] == "operation not permitted when stream is capturing"
    assert "graph_warm_ms" not in found[0]


def test_a_variant_that_breaks_is_reported_and_fails_the_check() -> None:
    def broken(case: Case, device: torch.device) -> Any:
        raise KeyError("inside another library")

    plan = replace(PLAN, batches=(1,))
    found = list(gpu_check.times(FakeMachine(), plan, {"broken": broken, "eager bf16": VARIANTS["eager bf16"]}))
    assert (found[0]["failed"], found[0]["why_not"]) == (True, "KeyError: 'inside another library'")
    assert "warm_ms" in found[1]
    right = [{"backend": "triton", "ok": True, "same_bits_twice": True}]
    assert not gpu_check.passed({"correctness": right, "sanitizer": [], "times": found, "broken": []})
    assert gpu_check.passed({"correctness": right, "sanitizer": [], "times": found[1:], "broken": []})


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
    assert not gpu_check.passed({"correctness": correct, "sanitizer": sanitizer, "times": [], "broken": []})


def test_a_whole_report_from_emulated_kernels(tmp_path: Path, cache: Path) -> None:
    machine = FakeMachine()
    machine.findings = {"memcheck": (True, "ERROR SUMMARY: 0 errors")}
    plan = replace(PLAN, batches=(1,), repeats=1, experts=EXPERTS[:2])
    variants = {name: VARIANTS[name] for name in ("triton", "eager bf16")}
    json_file, report = tmp_path / "found.json", tmp_path / "found.md"
    with offline_driver(target("sm_80"), Emulator(), cache):
        code = gpu_check.check(machine, plan, json_file, report, 5, predictions(tmp_path), variants)
    found = json.loads(json_file.read_text())
    triton = [entry for entry in found["correctness"] if entry["backend"] == "triton"]
    assert [entry["ok"] for entry in triton] == [True] * 3
    assert all(entry["same_bits_twice"] for entry in triton)
    assert [entry["tensors"] for entry in triton[1:]] == [1 + 1 + 10, 1 + 1 + 10]
    assert triton[0]["rms"] <= 2 * triton[0]["eager_rms"]
    assert triton[0]["tensors"] == 2 + 2 + 28
    assert code == 0
    assert [p["predicted_ms"] for p in found["predicted"]] == [1.0, 7.0]
    text = report.read_text()
    assert text.startswith("# cast_kernels ")
    for part in ("NVIDIA H100", "memcheck | ok", "| triton | bf16 |", "eager bf16 | training", "ratio"):
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


@pytest.mark.parametrize("calls", [0, 10 * PLAN.repeats])
def test_what_was_found_before_the_device_died_is_in_the_report(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    variants = {"eager bf16": VARIANTS["eager bf16"]}
    assert gpu_check.check(DyingMachine(calls), PLAN, None, None, 5, tmp_path, variants) == 1
    found = json.loads((tmp_path / "gpu-check-nvidia-h100-80gb-hbm3.json").read_text())
    assert [entry["backend"] for entry in found["correctness"]] == ["triton", "cpu"]
    assert [entry["failed"] for entry in found["times"] if "failed" in entry] == ([True] if calls else [])
    assert [b["section"] for b in found["broken"]] == ([] if calls else ["ceilings", "times"])
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
    monkeypatch.setattr(gpu_check, "times", lambda *_: iter(()))
    found = gpu_check.collect(FakeMachine(), PLAN, 5, tmp_path, {}, lambda found: saved.append(json.dumps(found)))
    assert found["broken"] == [{"section": "correctness", "error": "MemoryError: shared memory"}]
    assert len(found["correctness"]) == 1
    assert found["ceilings"]
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
    assert "illegal memory" in next(found)["why_not"]
    next(found)
    with pytest.raises(gpu_check.UnusableError, match="was not run"):
        next(found)


def test_a_context_that_a_capture_ends_is_no_step_without_a_graph() -> None:
    class Fatal(DyingMachine):
        def capture(self, step: Any) -> Any:
            self.calls = -1
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    plan = replace(PLAN, batches=(1,), repeats=1)
    (found,) = gpu_check.times(Fatal(1000), plan, {"eager bf16": VARIANTS["eager bf16"]})
    assert found["failed"]
    assert "UnusableError" in found["why_not"]


def test_errors_with_brackets_and_bars_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(case: Case, device: torch.device) -> Any:
        raise ValueError("[/rows] |\nmore")

    monkeypatch.chdir(tmp_path)
    plan = replace(PLAN, batches=(1,), repeats=1)
    assert gpu_check.check(FakeMachine(), plan, None, None, 5, tmp_path, {"broken": broken}) == 1
    assert "[/rows]" in capsys.readouterr().out
    (report,) = tmp_path.glob("*.md")
    assert "| ValueError: [/rows] \\| more |" in report.read_text()


def test_a_report_of_an_unfinished_run_is_no_good_news() -> None:
    right = [{"backend": "triton", "ok": True, "same_bits_twice": True}]
    found = {"correctness": right, "sanitizer": [], "times": [], "broken": []}
    assert gpu_check.passed(found)
    assert not gpu_check.passed(found | {"unfinished": ["times"]})


def sanitizer(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compute-sanitizer of this shell script in the search path, with a limit of half a second."""
    program = folder / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(machines, "_SANITIZER_SECONDS", 0.5)


def test_a_sanitizer_above_its_limit_fails_and_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sanitizer(tmp_path, f"echo begun\nsleep 60 &\necho $! > {tmp_path}/pid\nwait", monkeypatch)
    assert CudaMachine.sanitize(FakeMachine(), "memcheck", "") == (False, "begun\nnot done after 0.5 s")  # type: ignore
    child = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


@pytest.mark.parametrize(("code", "ok"), [(0, True), (86, False)])
def test_the_sanitizer_sees_every_tensor_alone(
    code: int, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sanitizer(tmp_path, f"echo $2 $PYTORCH_NO_CUDA_MEMORY_CACHING; exit {code}", monkeypatch)
    assert CudaMachine.sanitize(FakeMachine(), "racecheck", "") == (ok, "racecheck 1")  # type: ignore[arg-type]


def test_the_sanitized_program_runs_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments are those of problems that exist; the same on triton is in the heavy test."""
    ran = []

    def eagerly(real: Any) -> Any:
        def running(case: Any, *arguments: Any, device: str) -> None:
            ran.append((getattr(case, "op", "bcast"), device))
            real(case, backend="eager", dtype=torch.bfloat16)

        return running

    monkeypatch.setattr(cases, "run", eagerly(run))
    monkeypatch.setattr(experts, "run_expert", eagerly(run_expert))
    exec(gpu_check._SANITIZED, {})
    assert ran == [(op, "cuda") for op in ("bcast", "ffn", "self_attention", "adapter")]


@pytest.mark.heavy
def test_the_other_expert_ops_and_parameters_in_fp32_in_emulation(cache: Path) -> None:
    plan = replace(PLAN, cases=(), experts=EXPERTS, batches=(1,), repeats=1)
    with offline_driver(target("sm_80"), Emulator(), cache):
        checked = [c for c in gpu_check.correctness(FakeMachine(), plan, 5) if c["backend"] == "triton"]
        timed = list(gpu_check.times(FakeMachine(), plan, {"triton AMP": VARIANTS["triton AMP"]}))
    assert [entry["tensors"] for entry in checked] == [1 + 1 + 10, 1 + 1 + 10, 1 + 2 + 4]
    assert all(entry["ok"] and entry["same_bits_twice"] for entry in checked)
    assert [entry["phase"] for entry in timed] == ["inference", "training"]
    with offline_driver(target("sm_80"), Recorder(), cache) as recorder:
        exec(gpu_check._SANITIZED.replace("cuda", "cpu"), {})
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
    assert [entry["backend"] for entry in first] == ["triton", "cpu"]
    assert "the streams are on cpu" in first[0]["why_not"]
    assert first[1]["rms"] != second[1]["rms"]


@pytest.mark.parametrize(("measured", "inside"), [(1.3, True), (1.5, False), (0.5, False)])
def test_predicted_beside_measured(measured: float, inside: bool, tmp_path: Path) -> None:
    known = gpu_report.predictions_for(FakeMachine().describe(), predictions(tmp_path))
    assert known == {(1, "inference"): 1.0, (1, "training"): 7.0}
    times = [
        {"variant": "triton", "batch": 1, "phase": "inference", "warm_ms": 2.0, "graph_warm_ms": measured},
        {"variant": "eager bf16", "batch": 1, "phase": "inference", "warm_ms": 3.0},
        {"variant": "triton", "batch": 6, "phase": "inference", "warm_ms": 3.0},
        {"variant": "triton", "batch": 1, "phase": "", "why_not": "no"},
    ]
    (found,) = gpu_report.beside(times, known)
    assert (found["measured_ms"], found["ratio"], found["inside"]) == (measured, measured, inside)
    for name, count in (("NVIDIA GeForce RTX 4090", 128), ("NVIDIA GH200 480GB", 132), ("NVIDIA H100 PCIe", 114),
                        ("NVIDIA H100 NVL", 132)):  # fmt: skip
        assert gpu_report.predictions_for({"name": name, "multiprocessors": count}, tmp_path) == {}


def test_another_librarys_attention_takes_pytorchs_place() -> None:
    seen = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(q.shape))
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    q, k, v = (torch.randn(5, 2, 7, 16) for _ in range(3))
    with AttentionBy(attention):
        ours = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(ours, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert seen == [(5, 7, 2, 16)]
