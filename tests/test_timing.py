"""The one timer: samples side by side, their spread, and speed-ups that another program on the machine cannot fake."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from fake_machine import FakeMachine

from cast_kernels.gpu.timing import Spread, cold, host, interleave, median_ms, speedups


def scripted(seconds: dict[str, float], load: Callable[[int], float] = lambda call: 1.0) -> tuple[dict, Callable, list]:
    """Steps, what times them (so many seconds a call, times the load at each measurement), and the order of calls."""
    calls: list[str] = []

    def elapsed(step: Callable[[], object], repeats: int) -> float:
        for _ in range(repeats):
            step()
        return 1e3 * seconds[calls[-1]] * load(len(calls))

    return {name: lambda name=name: calls.append(name) for name in seconds}, elapsed, calls


def test_steps_are_timed_in_turn() -> None:
    steps, elapsed, calls = scripted({"a": 1.0, "b": 1.0})
    seen = interleave(elapsed, steps, 4, seconds=100.0, sample_seconds=0.1)
    assert calls == ["a", "b"] * 4  # slow steps: the first call of each was the first round
    assert {name: len(values) for name, values in seen.items()} == {"a": 4, "b": 4}


@pytest.mark.parametrize("seconds", [0.01, 100.0])
def test_however_slow_a_step_is_it_has_three_samples(seconds: float) -> None:
    steps, elapsed, _ = scripted({"slow": seconds, "quick": 1e-3})
    seen = interleave(elapsed, steps, 9, seconds=1e-3, sample_seconds=0.0)
    assert {len(values) for values in seen.values()} == {3}


def test_there_are_as_many_rounds_as_fit() -> None:
    steps, elapsed, _ = scripted({"a": 1.0, "b": 2.0})
    assert len(interleave(elapsed, steps, 50, seconds=16.0, sample_seconds=0.0)["a"]) == 5
    assert len(interleave(elapsed, steps, 4, seconds=1e3, sample_seconds=0.0)["a"]) == 4


def test_a_quick_call_is_repeated_within_a_sample() -> None:
    steps, elapsed, calls = scripted({"a": 0.01, "b": 1.0})
    seen = interleave(elapsed, steps, 3, seconds=100.0, sample_seconds=0.1)
    assert calls.count("a") == 1 + 3 * 10
    assert calls.count("b") == 1 + 3
    assert seen["a"] == pytest.approx([10.0] * 3)


def test_a_neighbour_that_takes_the_cores_for_a_while_makes_nobody_faster() -> None:
    """Both take as long; while the first is measured in rounds 2 and 3 the machine is 2.3 times slower."""
    steps, elapsed, _ = scripted({"eager": 1.0, "fused": 1.0}, lambda call: 2.3 if call in (3, 5) else 1.0)
    seen = interleave(elapsed, steps, 7, seconds=100.0, sample_seconds=0.0)
    ratio = speedups(seen["eager"], seen["fused"])
    assert ratio.median == 1.0
    assert (ratio.low, ratio.high) == (1.0, 2.3)  # what there was to see is in the spread


def test_a_machine_that_slows_down_for_all_leaves_the_ratio() -> None:
    steps, elapsed, _ = scripted({"eager": 3.0, "fused": 2.0}, lambda call: 1.0 + (call - 1) // 2)
    seen = interleave(elapsed, steps, 5, seconds=1e3, sample_seconds=0.0)
    assert Spread.of(seen["eager"]).high == 5 * Spread.of(seen["eager"]).low
    assert speedups(seen["eager"], seen["fused"]) == Spread(1.5, 1.5, 1.5)


def test_the_spread_is_all_of_few_samples_and_the_middle_half_of_many() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 900.0]) == Spread(5.0, 3.0, 7.0)


def test_a_step_that_raises_is_told_and_the_others_go_on() -> None:
    steps, elapsed, calls = scripted({"a": 1.0, "bad": 1.0, "b": 1.0})

    def failing(step: Callable[[], object], repeats: int) -> float:
        ms = elapsed(step, repeats)
        if calls[-1] == "bad" and calls.count("bad") == 2:
            raise RuntimeError("out of memory")
        return ms

    lost: list[str] = []
    seen = interleave(failing, steps, 4, 100.0, 0.0, lambda name, error: lost.append(f"{name}: {error}"))
    assert lost == ["bad: out of memory"]
    assert {name: len(values) for name, values in seen.items()} == {"a": 4, "b": 4}
    steps, elapsed, calls = scripted({"a": 1.0, "bad": 1.0})
    with pytest.raises(RuntimeError, match="out of memory"):
        interleave(failing, steps, 4, 100.0, 0.0)


def test_the_cache_is_cold_before_each_call() -> None:
    machine = FakeMachine()
    interleave(cold(machine), {"a": lambda: None}, 3, 1.0, 0.0)
    assert machine.log == ["flush", "time"] * 3


def test_the_host_is_timed_from_an_idle_gpu_to_its_last_launch() -> None:
    machine = FakeMachine()
    (times,) = interleave(host(machine), {"a": lambda: time.sleep(0.01)}, 3, 1.0, 0.0).values()
    assert machine.log == ["wait"] * 3  # and none after the step
    assert all(10 <= ms < 1000 for ms in times)


def test_a_median_is_over_the_samples_after_a_warm_up() -> None:
    times = iter([9.0, 1.0, 2.0, 50.0, 3.0])
    machine, calls = FakeMachine(lambda: next(times)), []
    assert median_ms(machine, lambda: calls.append(1), 5) == 3.0
    assert len(calls) == 3 + 5
    assert machine.log == ["wait", *["time"] * 5]
