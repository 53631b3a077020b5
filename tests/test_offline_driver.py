"""The Triton driver without a GPU: what reaches the launcher, and that nothing of it stays behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import triton
from ptx_emulator.targets import TARGETS, target
from ptx_emulator.triton.driver import Launch, Launcher, Recorder, offline_driver
from triton.runtime.errors import OutOfResources
from triton_kernels import product, scale, scale_kernel, tuple_kernel

from cast_kernels.evidence.cases import poisoned_memory


class Keeper:
    """Keeps every launch."""

    enforces_limits = True

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launch(self, launch: Launch) -> None:
        self.launches.append(launch)


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


def test_a_launch_arrives_as_it_was_made(cache: Path) -> None:
    x = bf16(300)
    with offline_driver(target("sm_80"), Keeper(), cache) as keeper:
        y = scale(x, 1.5)
    (launch,) = keeper.launches
    assert (launch.kernel, launch.grid, launch.threads) == ("scale_kernel", (3, 1, 1), 128)
    assert [(a.name, a.type) for a in launch.arguments] == [
        ("x", "*bf16"), ("y", "*fp32"), ("factor", "fp32"), ("n", "i32"),
    ]  # fmt: skip
    values = [a.value for a in launch.arguments]
    assert values[0] is x
    assert values[1].data_ptr() == y.data_ptr()
    assert values[2:] == [1.5, 300]
    assert launch.constexprs == {"BLOCK": 128}
    assert ".target sm_80" in launch.asm["ptx"]
    assert ".visible .entry scale_kernel(" in launch.asm["ptx"]
    assert launch.metadata.num_warps == 4


def test_constants_that_triton_finds_are_no_arguments(cache: Path) -> None:
    with offline_driver(target("sm_80"), Keeper(), cache) as keeper:
        scale(bf16(1), 2.0)
    (launch,) = keeper.launches
    assert [a.name for a in launch.arguments] == ["x", "y", "factor"]
    assert launch.constexprs == {"n": 1, "BLOCK": 128}


def test_tuples_are_flattened(cache: Path) -> None:
    x, y = torch.ones(16), torch.empty(16)
    with offline_driver(target("sm_80"), Keeper(), cache) as keeper:
        tuple_kernel[(1,)](x, (7, 2.5), y, BLOCK=16)
    (launch,) = keeper.launches
    assert [(a.name, a.value) for a in launch.arguments[1:3]] == [("sizes.0", 7), ("sizes.1", 2.5)]


@pytest.mark.parametrize(
    ("name", "key", "text"),
    [
        ("sm_80", "ptx", ".target sm_80"),
        ("sm_90", "ptx", ".target sm_90a"),
        ("sm_100", "ptx", ".target sm_100a"),
        ("gfx942", "amdgcn", '-gfx942"'),
    ],
)
def test_each_target_compiles_its_own_code(name: str, key: str, text: str, cache: Path) -> None:
    with offline_driver(target(name), Recorder(), cache) as recorder:
        scale(bf16(300), 1.5)
    (record,) = recorder.records.values()
    assert text in record.first.asm[key]
    assert record.first.threads == 4 * TARGETS[name].warp_size


def test_the_recorder_runs_nothing_and_counts(cache: Path) -> None:
    with offline_driver(target("sm_80"), Recorder(), cache) as recorder, poisoned_memory():
        outputs = [scale(bf16(300), 1.5), scale(bf16(130), 2.5), scale(bf16(300).float(), 1.5)]
    assert all(y.isnan().all() for y in outputs)
    assert [(r.launches, r.grids) for r in recorder.records.values()] == [(2, [(3, 1, 1), (2, 1, 1)]), (1, [(3, 1, 1)])]


def test_nothing_leaks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/as/it/was")
    config = triton.runtime.driver
    before = (config._active, dict(scale_kernel.device_caches))
    for name in ("sm_80", "sm_90", "sm_80"):
        with offline_driver(target(name), Keeper(), cache) as keeper:
            assert config.active.runs_on_cpu
            assert os.environ["TRITON_CACHE_DIR"] == str(cache)
            scale(bf16(300), 1.5)
        assert f".target {name}" in keeper.launches[0].asm["ptx"]
        assert (config._active, dict(scale_kernel.device_caches)) == before
        assert os.environ["TRITON_CACHE_DIR"] == "/as/it/was"
    assert not getattr(config._active, "runs_on_cpu", False)


def test_what_was_there_is_no_work_for_the_collector(cache: Path) -> None:
    """Of a cycle that is made inside it makes an end, one from before stays until the context ends."""

    class Knot:
        def __init__(self) -> None:
            self.end = self

    before, inside = weakref.ref(Knot()), None
    with offline_driver(target("sm_80"), Recorder(), cache):
        inside = weakref.ref(Knot())
        gc.collect()
        assert before() is not None
        assert inside() is None
    gc.collect()
    assert before() is None
    assert gc.get_freeze_count() == 0


def test_an_error_inside_restores_too(cache: Path) -> None:
    before = triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), offline_driver(target("sm_80"), Recorder(), cache):
        raise ZeroDivisionError
    assert triton.runtime.driver._active is before


def test_contexts_nest(cache: Path) -> None:
    with offline_driver(target("sm_80"), Keeper(), cache) as outer:
        with offline_driver(target("sm_90"), Keeper(), cache) as inner:
            scale(bf16(300), 1.5)
        scale(bf16(300), 1.5)
    assert [launch.target.name for launch in (*outer.launches, *inner.launches)] == ["sm_80", "sm_90"]


@pytest.mark.parametrize(("launcher", "allowed"), [(Keeper(), False), (Recorder(), True)])
def test_shared_memory_over_the_limit(launcher: Launcher, allowed: bool, cache: Path) -> None:
    """A launcher that executes meets the limit as a GPU would; the recorder passes the kernel on to be judged."""
    a, b = bf16(64, 512), bf16(512, 256)
    with offline_driver(target("sm_80"), launcher, cache):
        if allowed:
            product(a, b, bm=64, bk=128, stages=4)
        else:
            with pytest.raises(OutOfResources):
                product(a, b, bm=64, bk=128, stages=4)
    with offline_driver(target("sm_90"), Keeper(), cache) as fits:
        product(a, b, bm=64, bk=64, stages=4)
    assert len(fits.launches) == 1


def test_autotuning_is_refused(cache: Path) -> None:
    tuned = triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["n"])(scale_kernel)
    x = bf16(300)
    with offline_driver(target("sm_80"), Recorder(), cache), pytest.raises(RuntimeError, match="without a GPU"):
        tuned[(3,)](x, torch.empty(300), 1.5, 300)


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'sm_70'; allowed: sm_80, .*gfx942"):
        target("sm_70")


def test_the_interpreter_is_refused() -> None:
    code = """
from ptx_emulator.triton.driver import Recorder, offline_driver
from ptx_emulator.targets import target
with offline_driver(target("sm_80"), Recorder()): pass
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent.parent / "tools")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "RuntimeError: TRITON_INTERPRET is set" in done.stderr


def test_what_the_caller_froze_stays_frozen() -> None:
    mine: list[object] = [[]]

    def is_frozen() -> bool:
        return not any(one is mine for one in gc.get_objects())  # of the generations, not of what is frozen

    assert not is_frozen()
    gc.freeze()
    try:
        with offline_driver(target("sm_80"), Recorder()), offline_driver(target("sm_90"), Recorder()):
            assert is_frozen()
        assert is_frozen()
    finally:
        gc.unfreeze()
    assert not is_frozen()
