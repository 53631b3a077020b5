"""Plans and their launches: the same kernel, arguments and hooks as through Triton, which is asked once."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launch, offline_driver
from torch import Tensor

from cast_kernels import plans
from cast_kernels.triton import launch as launching
from cast_kernels.triton import tiles
from cast_kernels.triton.launch import Plan, Planner, planned


class Pair(NamedTuple):
    """Two vectors."""

    x: Any  # [n]
    y: Any  # [n], written


@triton.jit(do_not_specialize=["n"])
def pair_kernel(first, second, n, factors, BLOCK: tl.constexpr):
    """y = factor * x for both pairs, a program each."""
    own = second
    if tl.program_id(0) == 0:
        own = first
    at = tl.arange(0, BLOCK)
    tl.store(own.y + at, tl.load(own.x + at, mask=at < n) * factors[0], mask=at < n)


class Keeper:
    """Keeps every launch."""

    enforces_limits = True

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launch(self, launch: Launch) -> None:
        self.launches.append(launch)


@planned
def make(n: int, dtype: torch.dtype = torch.float32) -> Plan:
    """A vector given, one written, and one of each other kind between."""
    planner = Planner()
    x, y = planner.given(n, dtype=dtype), planner.given(n, dtype=dtype)
    kept, middle = planner.saved(n, dtype=dtype), planner.scratch(n, dtype=dtype)
    planner.scratch(1, dtype=torch.int64)
    last = planner.scratch(n, dtype=dtype)
    planner.launch(pair_kernel, (2,), Pair(x, kept), Pair(x, middle), n, (2.0,), BLOCK=128)
    planner.launch(pair_kernel, (2,), Pair(middle, last), Pair(kept, y), n, (0.5,), BLOCK=128, num_warps=8)
    return planner.plan()


def run(n: int = 100, x: Tensor | None = None, y: Tensor | None = None) -> Plan:
    """One call of the plan."""
    plan = make(n)
    x, y = torch.ones(n) if x is None else x, torch.empty(n) if y is None else y
    plan.run([x, y], torch.empty(plan.saved_bytes // 4), inputs=1)
    return plan


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched through Triton's own way."""
    names: list[str] = []
    true = triton.JITFunction.run

    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.__name__)
        return true(self, *arguments, **options)

    monkeypatch.setattr(triton.JITFunction, "run", noted)
    return names


def test_triton_is_asked_once_and_every_launch_is_the_same(cache: Path, bound: list[str]) -> None:
    with offline_driver(target("sm_80"), Keeper(), cache) as keeper:
        run()
        assert bound == ["pair_kernel"] * 2
        run()
    assert len(bound) == 2
    for before, after in zip(keeper.launches[:2], keeper.launches[2:], strict=True):
        assert (before.identity, before.grid, before.constexprs) == (after.identity, after.grid, after.constexprs)
        for one, other in zip(before.arguments, after.arguments, strict=True):
            assert (one.name, one.type) == (other.name, other.type)
            if isinstance(one.value, Tensor):
                assert (one.value.shape, one.value.dtype) == (other.value.shape, other.value.dtype)
            else:
                assert one.value == other.value
    first = keeper.launches[0]
    assert [a.name for a in first.arguments] == ["first.0", "first.1", "second.0", "second.1", "n", "factors.0"]
    assert keeper.launches[3].metadata.num_warps == 8


def test_a_plan_tells_what_a_call_takes(cache: Path) -> None:
    """Each part of an allocation has whole lines of 128 bytes."""
    with offline_driver(target("sm_80"), Keeper(), cache):
        plan = make(100)
    assert isinstance(plan, plans.Plan)
    assert plan.kernels == ("pair_kernel", "pair_kernel")
    assert (plan.saved_bytes, plan.scratch_bytes) == (512, 512 + 128 + 512)


def test_addresses_are_those_of_the_tensors(cache: Path) -> None:
    """What a GPU's driver gets is where the tensors lie that the emulator is shown."""
    found: list[list[Any]] = []
    x, y = torch.ones(100), torch.empty(100)
    with offline_driver(target("sm_80"), Keeper(), cache) as keeper:
        plan = make(100)
        saved, scratch = torch.empty(plan.saved_bytes // 4), torch.empty(plan.scratch_bytes, dtype=torch.uint8)
        driver = triton.runtime.driver.active
        for driver.takes_tensors in (True, True, False):
            keeper.launches.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(launching, "_scratch", lambda *_: scratch)
                plan.run([x, y], saved, inputs=1)
            values = [a.value for launch in keeper.launches for a in launch.arguments]
            assert any(isinstance(value, Tensor) for value in values) == driver.takes_tensors
            found.append([value.data_ptr() if isinstance(value, Tensor) else value for value in values])
    assert found[0] == found[1] == found[2]
    pointers = [value for value in found[0] if isinstance(value, int) and value > 1000]
    assert len(pointers) == 8
    assert all(value % launching.ALIGNMENT == 0 for value in pointers)
    assert saved.data_ptr() in pointers
    assert scratch.data_ptr() in pointers


def test_an_input_that_is_not_aligned_is_copied(cache: Path, bound: list[str]) -> None:
    """Or a kernel that reads 16 bytes at a time would fault; and no second kernel is compiled for it."""
    whole = torch.arange(101.0)
    with offline_driver(target("sm_80"), Keeper(), cache) as keeper:
        run()
        run(x=whole[1:])
        (value,) = [a.value for a in keeper.launches[2].arguments if a.name == "first.0"]
        assert value.data_ptr() % 16 == 0
        assert torch.equal(value, whole[1:])
        with pytest.raises(ValueError, match=r"tensor 1 of a plan is at address .* no multiple of 16"):
            run(y=whole[1:])
    assert len(bound) == 2


def test_hooks_see_every_launch(cache: Path) -> None:
    seen: list[tuple[str, str]] = []
    hooks = triton.knobs.runtime

    def enter(metadata: Any) -> None:
        seen.append(("enter", metadata.get()["name"]))

    def leave(metadata: Any) -> None:
        seen.append(("leave", metadata.get()["name"]))

    with offline_driver(target("sm_80"), Keeper(), cache):
        driver = triton.runtime.driver.active
        make_launcher = driver.launcher_cls

        def launcher_cls(source: Any, metadata: Any) -> Any:
            inner = make_launcher(source, metadata)

            def launch(x: int, y: int, z: int, stream: int, function: Any, packed: Any, data: Any, enter: Any,
                       leave: Any, *values: Any) -> None:  # fmt: skip
                if enter is not None and data is not None:
                    enter(data)
                inner(x, y, z, stream, function, packed, data, enter, leave, *values)
                if leave is not None and data is not None:
                    leave(data)

            return launch

        driver.launcher_cls = launcher_cls
        run()
        seen.clear()
        hooks.launch_enter_hook.add(enter)
        hooks.launch_exit_hook.add(leave)
        try:
            run()
        finally:
            hooks.launch_enter_hook.remove(enter)
            hooks.launch_exit_hook.remove(leave)
        run()
    assert seen == [("enter", "pair_kernel"), ("leave", "pair_kernel")] * 2


def test_a_kernel_goes_with_its_driver(cache: Path) -> None:
    kept = []
    for name in ("sm_80", "sm_90", "sm_80"):
        with offline_driver(target(name), Keeper(), cache) as keeper:
            run()
            run()
            kept.append(weakref.ref(make(100)))
        assert {launch.target.name for launch in keeper.launches} == {name}
        assert all(f".target {name}" in launch.asm["ptx"] for launch in keeper.launches)
    del keeper
    gc.collect()
    assert [plan() for plan in kept] == [None] * 3


def test_plans_are_bounded(cache: Path, bound: list[str]) -> None:
    """And sizes that change at every call compile nothing."""
    count = launching.MOST_PLANS + 5
    with offline_driver(target("sm_80"), Keeper(), cache) as keeper:
        made = [weakref.ref(run(n)) for n in range(1, count + 1)]
        gc.collect()
        assert len([plan for plan in made if plan() is not None]) == launching.MOST_PLANS
        asked = len(bound)
        run(count)
        assert len(bound) == asked == 2 * count
        run(1)
        assert len(bound) == asked + 2
    assert len({launch.identity for launch in keeper.launches}) == 2


@pytest.mark.parametrize("setting", ["debug", "tiles", "device"])
def test_a_plan_is_of_its_circumstances(setting: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with offline_driver(target("sm_80"), Keeper(), cache):
        before = make(100)
        assert make(100) is before
        if setting == "debug":
            monkeypatch.setattr(triton.knobs.runtime, "debug", True)
        elif setting == "tiles":
            known = tiles.find_set("sm_80", 16, 384)
            with tiles.trying("sm_80", 16, 384, known):
                assert make(100) is not before
        else:
            driver = triton.runtime.driver.active
            monkeypatch.setattr(driver, "device", driver.device + 1)
        assert make(100) is not before


def test_a_kernel_that_triton_watches_stays_with_triton(cache: Path, bound: list[str]) -> None:
    """A hook before each run would not be called otherwise."""
    ran: list[int] = []
    pair_kernel.add_pre_run_hook(lambda *_, **__: ran.append(1))
    try:
        with offline_driver(target("sm_80"), Keeper(), cache):
            run()
            run()
    finally:
        pair_kernel.pre_run_hooks.clear()
    assert len(ran) == len(bound) == 4


def test_two_threads(cache: Path) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for n in (10, 20, 30) * 5:
                run(n)
        except BaseException as error:  # would be lost with its thread
            errors.append(error)

    with offline_driver(target("sm_80"), Keeper(), cache) as keeper:
        run()
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(keeper.launches) == 2 * (1 + 2 * 15)


def test_the_stream_is_asked_for_at_every_call(cache: Path) -> None:
    used: list[int] = []
    with offline_driver(target("sm_80"), Keeper(), cache):
        driver = triton.runtime.driver.active
        make_launcher: Callable[..., Any] = driver.launcher_cls
        driver.launcher_cls = lambda *a: (lambda inner: lambda x, y, z, stream, *rest: (
            used.append(stream), inner(x, y, z, stream, *rest)
        ))(make_launcher(*a))  # fmt: skip
        for number in (7, 8, 9):
            driver.get_current_stream = lambda device, number=number: number
            run()
    assert used == [7, 7, 8, 8, 9, 9]
