"""Measuring: interleaved samples with a noise filter, bytes kept for backward, error against fp64."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

#: A sample during which other processes kept more than this share of one core busy does not count, if enough others do.
NOISE_CORES = 0.12
#: One sample repeats its call until this many seconds have passed, so that /proc/stat's 10 ms ticks resolve it.
SAMPLE_SECONDS = 0.15


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


def interleave(steps: dict[str, Callable[[], object]], samples: int) -> dict[str, dict[str, float]]:
    """Time every step in turn, A B C A B C ..., so that a change of the machine's clock or load meets all alike.

    Returns:
        name -> {"min_ms", "median_ms", "samples", "clean"}: over clean samples where there are at least three.
    """
    repeats = {}
    for name, step in steps.items():
        step()  # compiles, allocates, warms caches
        start = time.perf_counter()
        step()
        repeats[name] = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(samples):
        for name, step in steps.items():
            busy, own, start = _busy_seconds(), _own_seconds(), time.perf_counter()
            for _ in range(repeats[name]):
                step()
            wall = time.perf_counter() - start
            others = max(0.0, (_busy_seconds() - busy) - (_own_seconds() - own)) / wall
            seen[name].append((1e3 * wall / repeats[name], others))
    result = {}
    for name, values in seen.items():
        clean = [ms for ms, others in values if others < NOISE_CORES]
        used = clean if len(clean) >= 3 else [ms for ms, _ in values]
        result[name] = {
            "min_ms": min(used), "median_ms": statistics.median(used), "samples": len(values), "clean": len(clean),
        }  # fmt: skip
    return result


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
