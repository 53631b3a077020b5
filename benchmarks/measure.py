"""Measuring: interleaved samples with a noise filter, bytes kept for backward, peak memory, error against fp64."""

from __future__ import annotations

import os
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

#: A sample during which other processes kept more than this share of one core busy does not count, if enough others do.
NOISE_CORES = 0.12
#: One sample repeats its call until this many seconds have passed, so that /proc/stat's 10 ms ticks resolve it.
SAMPLE_SECONDS = 0.15
#: A call that takes longer than this is a sample already the first time, as the machine has no minutes to spare.
SLOW_SECONDS = 2.0
#: Samples of each quicker step, whatever the time allowed for the group.
FEWEST = 3


class Unavailable(RuntimeError):
    """A variant that cannot be measured here; the message says why and what would change it."""


def _busy_seconds() -> float:
    """Seconds of work that all processors have done since boot; 0 where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def interleave(steps: dict[str, Callable[[], object]], samples: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Time every step in turn, A B C A B C ..., so that a change of the machine's clock or load meets all alike.

    Args:
        steps: name -> call. Every one has been called before, so that nothing is left to compile.
        samples: of each step, at most.
        seconds: that all samples together may take; there are fewer of slow steps, but at least one of those that
            take longer than :data:`SLOW_SECONDS` and :data:`FEWEST` of the others.

    Returns:
        name -> {"min_ms", "median_ms", "samples", "clean", "all_ms"}: minimum and median over clean samples where
        there are at least three of them, else over all; `all_ms` has every sample in the order of measuring.
    """
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    durations = {}
    for name, step in steps.items():
        first = _sample(step, 1)
        if first[0] >= 1e3 * SLOW_SECONDS:
            seen[name].append(first)
        durations[name] = (seen[name] or [_sample(step, 1)])[0][0] / 1e3
    repeats = {name: max(1, round(SAMPLE_SECONDS / duration)) for name, duration in durations.items()}
    left = seconds - sum(durations[name] for name in steps if seen[name])
    fit = left // sum(repeats[name] * durations[name] for name in steps)
    rounds, quick = int(max(0, min(samples, fit))), [name for name in steps if not seen[name]]
    for turn in range(max(rounds, min(samples, FEWEST) if quick else 0)):
        for name in steps if turn < rounds else quick:
            seen[name].append(_sample(steps[name], repeats[name]))
    result = {}
    for name, values in seen.items():
        clean = [ms for ms, others in values if others < NOISE_CORES]
        used = clean if len(clean) >= 3 else [ms for ms, _ in values]
        result[name] = {
            "min_ms": min(used), "median_ms": statistics.median(used), "samples": len(values), "clean": len(clean),
            "all_ms": [ms for ms, _ in values],
        }  # fmt: skip
    return result


def _sample(step: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Milliseconds of one call, and how many cores other processes kept busy meanwhile."""
    busy, own, start = _busy_seconds(), _own_seconds(), time.perf_counter()
    for _ in range(repeats):
        step()
    wall = time.perf_counter() - start
    others = max(0.0, (_busy_seconds() - busy) - (_own_seconds() - own)) / wall
    return 1e3 * wall / repeats, others


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise :class:`Unavailable` in the main thread once `seconds` have passed, as soon as Python code runs again.

    A compiler's own handlers must not swallow the signal's exception, so it is none that `except Exception` sees. The
    timer that ran before (pytest-timeout's) goes on afterwards.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise _OutOfTimeError

    handler, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _OutOfTimeError:
        raise Unavailable(f"{what} was stopped after {seconds:.0f} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)), interval)


class _OutOfTimeError(BaseException):
    pass


def peak_memory(run: Callable[[], object]) -> dict[str, float]:
    """Resident memory of this process, in MiB: `before_mib`, and the largest while `run` ran, `peak_mib`.

    Read from the address space's own high-water mark, which is reset first: getrusage's would include what the parent
    process held before this one replaced it.

    Raises:
        Unavailable: the system has no /proc with these counters.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_mib("VmRSS")
        run()
        peak = _status_mib("VmHWM")
    except OSError as error:
        raise Unavailable(f"peak memory is read from Linux's /proc: {error}") from None
    return {"before_mib": before, "peak_mib": peak}


def _status_mib(field: str) -> float:
    match = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024


def bytes_kept_for_backward(call: Callable[[], object], exclude: list[Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps after `call`, without those of `exclude` (parameters)."""
    ours = {x.untyped_storage().data_ptr() for x in exclude}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()  # held until the sum is taken: a freed storage's address could come again
    total = sum(kept.values())
    del result
    return total


def rms_error(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square of (ours - exact) for every tensor."""
    assert ours.keys() == exact.keys()
    return {name: float((ours[name].double() - truth).square().mean().sqrt()) for name, truth in exact.items()}
