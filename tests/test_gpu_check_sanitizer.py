"""The sanitizer's part of `cast-kernels gpu-check`, with a program in compute-sanitizer's place."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_machine import FakeMachine

from cast_kernels import backends
from cast_kernels.evidence import cases, experts
from cast_kernels.evidence.cases import run
from cast_kernels.evidence.experts import run_expert
from cast_kernels.gpu import check as gpu_check
from cast_kernels.gpu import machine as machines
from cast_kernels.gpu.machine import CudaMachine
from cast_kernels.problem import Verdict


def sanitizer(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compute-sanitizer of this shell script in the search path, with a limit of half a second."""
    program = folder / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(machines, "_SANITIZER_SECONDS", 0.5)


def test_a_sanitizer_gets_no_more_than_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sanitizer(tmp_path, "sleep 60", monkeypatch)
    found = CudaMachine.sanitize(FakeMachine(), "memcheck", "", 0.25)  # type: ignore[arg-type]
    assert found == (False, "not done after 0.25 s")


def test_a_sanitizer_above_its_limit_fails_and_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sanitizer(tmp_path, f"echo begun\nsleep 60 &\necho $! > {tmp_path}/pid\nwait", monkeypatch)
    assert CudaMachine.sanitize(FakeMachine(), "memcheck", "") == (False, "begun\nnot done after 0.5 s")  # type: ignore
    child = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    until = time.monotonic() + 20  # a killed process is gone when it next gets a core
    while not _gone(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert _gone(child)


def _gone(stat: Path) -> bool:
    """Whether the process of /proc/<pid>/stat has ended."""
    try:
        return stat.read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


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
    exec(gpu_check.SANITIZED, {})
    assert ran == [(op, "cuda") for op in ("bcast", "ffn", "self_attention", "adapter")]


def test_it_runs_the_kernels_of_both_backends_where_both_can(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(cases, "run", lambda case, backend, *rest, device: ran.append((backend, case.bottleneck)))
    monkeypatch.setattr(experts, "run_expert", lambda *given, **named: None)
    monkeypatch.setattr(backends, "can_run", lambda name, problem: Verdict(name == "cuda", "as told"))
    exec(gpu_check.SANITIZED, {})
    assert ran == [("triton", 32), ("cuda", 192)]
