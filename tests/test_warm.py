"""`cast-kernels compile --cache`: a process on the GPU finds what it would compile, side by side if it must."""

from __future__ import annotations

import ast
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from log_messages import log_messages
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import OfflineDriver, Recorder, offline_driver
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from cast_kernels import cli
from cast_kernels.evidence import warm
from cast_kernels.evidence.parts import Model, parts
from cast_kernels.evidence.unrun import Unrun
from cast_kernels.triton import compiling
from cast_kernels.triton.launch import Planner

SMALL = Model(
    batch=1, recompute="nothing", depth=1, frames=2, grid=2, patch=8, dim=64, heads=2, hidden=64, adapter=16,
    bottleneck=32, verbs=3, nouns=3,
)  # fmt: skip


@contextmanager
def compilations() -> Iterator[list[bool]]:
    """For each kernel that Triton compiles or looks up, whether it was found."""
    found: list[bool] = []
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda cache_hit, **_: found.append(cache_hit)
        yield found


def step(model: Model, cache: Path) -> int:
    """One step as it is trained under autocast in bf16 -> the number of its kernels."""
    with offline_driver(target("sm_90"), Recorder(), cache) as recorder:
        for part in parts(model, "triton"):
            with Unrun():
                part.backward(part.forward(torch.bfloat16))
    return len(recorder.records)


def test_a_later_process_compiles_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Filled by processes of its own, as the command does it; the step here is at another batch size."""
    assert warm.main(["sm_90"], ["bf16"], [SMALL], tmp_path) == 0
    told = capsys.readouterr()
    assert told.err == "compiled 1 of 1 kinds of steps\n"
    assert str(tmp_path) in told.out
    with compilations() as found:
        kernels = step(replace(SMALL, batch=3), tmp_path)
    assert kernels > 10
    assert len(found) >= kernels
    assert all(found)
    with compilations() as found:  # and a kernel that the command does not know is seen
        step(replace(SMALL, adapter=32), tmp_path)
    assert not all(found)


def test_the_key_is_that_of_a_process_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton takes from its driver into the key is the target, and it is the same object."""
    driver = CudaDriver.__new__(CudaDriver)
    monkeypatch.setattr(driver, "get_current_device", lambda: 0, raising=False)
    monkeypatch.setattr(driver, "get_device_capability", lambda device: (9, 0), raising=False)
    real = CudaDriver.get_current_target(driver)
    assert real == OfflineDriver(target("sm_90"), Recorder()).get_current_target() == GPUTarget("cuda", 90, 32)


def test_without_a_gpu_a_target_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["compile", "--cache"]) == 1
    assert "say --target sm_90" in capsys.readouterr().err


def test_the_command_fills_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(warm, "main", lambda *arguments: asked.append(arguments) or 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cli.main(["compile", "--cache"]) == cli.main(["compile", "--cache", "--target", "sm_80", "sm_100"]) == 0
    assert asked == [(None, None), (["sm_80", "sm_100"], None)]
    assert warm.present() == "sm_90"


# --- the first call --------------------------------------------------------------------------------------------------


def test_a_plans_kernels_compile_side_by_side(tmp_path: Path) -> None:
    """Not one behind the other in the thread that launches, and once each; the launches come in their order."""
    from triton_kernels import scale_kernel, tuple_kernel

    threads: list[int] = []
    planner = Planner()
    x, y = planner.given(128, dtype=torch.float32), planner.given(128, dtype=torch.float32)
    planner.launch(scale_kernel, (1,), x, y, 2.0, 128, BLOCK=128, num_warps=4)
    planner.launch(tuple_kernel, (1,), x, (128, 3), y, BLOCK=128, num_warps=4)
    plan = planner.plan()
    with offline_driver(target("sm_80"), Recorder(), tmp_path) as recorder, triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda **_: threads.append(threading.get_ident())
        for _ in range(2):
            plan.run([torch.zeros(128), torch.zeros(128)], inputs=1)
    assert len(threads) == 2
    assert threading.get_ident() not in threads
    launches = {record.first.kernel: record.launches for record in recorder.records.values()}
    assert list(launches.items()) == [("scale_kernel", 2), ("tuple_kernel", 2)]


def test_a_long_compilation_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "PATIENCE", 0.01)
    compiling._say.cache_clear()
    with log_messages("cast_kernels") as told:
        for seconds in (0.3, 0.3):
            compiling.side_by_side([lambda s=seconds: time.sleep(s)] * 2)
        assert len(told) == 1
        assert "cast-kernels compile --cache" in told[0]
        compiling._say.cache_clear()
        monkeypatch.setattr(compiling, "PATIENCE", 60.0)
        compiling.side_by_side([lambda: None] * 2)
        assert len(told) == 1


def test_two_threads_that_compile_at_once_leave_the_parser_as_it_was() -> None:
    """Each puts a lock before Python's parser; were both at it, the last to end would put back the other's."""
    before = ast.parse
    begun, ended = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]
    jobs: list[list[Callable[[], object]]] = [
        [event.set, partial(end.wait, 10)] for event, end in zip(begun, ended, strict=True)
    ]
    threads = [threading.Thread(target=compiling.side_by_side, args=(job,)) for job in jobs]
    threads[0].start()
    assert begun[0].wait(10)
    threads[1].start()
    begun[1].wait(0.5)  # which it does not, while the first is at it
    for thread, end in zip(threads, ended, strict=True):
        end.set()
        thread.join()
    assert begun[1].is_set()
    assert ast.parse is before


def test_a_fault_in_a_kernel_is_raised() -> None:
    def fault() -> None:
        raise ZeroDivisionError("in a kernel")

    with pytest.raises(ZeroDivisionError, match="in a kernel"):
        compiling.side_by_side([fault, fault])
    assert os.environ.get("TRITON_INTERPRET") != "1"
