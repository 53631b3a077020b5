"""Measurements other than time: the CPU as a machine, bytes kept for backward, peak memory, error against fp64."""

from __future__ import annotations

import gc
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from cast_kernels.gpu.machine import Step


class Unavailable(RuntimeError):
    """A variant that cannot be measured here; the message gives the reason and a remedy."""


class CpuMachine:
    """This machine's processors, with the methods of :class:`cast_kernels.gpu.machine.Machine` that a CPU supports."""

    stand_in = ""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def elapsed_ms(self, step: Step, repeats: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return 1e3 * (time.perf_counter() - start) / repeats

    def synchronise(self) -> None:
        pass

    def computed(self) -> bool:
        return True

    def free(self) -> None:
        gc.collect()


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise :class:`Unavailable` in the main thread after `seconds`, as soon as Python code runs again.

    `except Exception` does not catch the signal's exception, so a compiler's handlers cannot swallow it. An earlier
    timer (pytest-timeout's) continues afterwards.
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

    The peak is the address space's own high-water mark, reset first. getrusage's would include the memory of the parent
    process before this one replaced it.

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
        result = call()  # held until the sum is taken, because a freed storage's address could occur again
    total = sum(kept.values())
    del result
    return total


def rms_error(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square of (ours - exact) for every tensor, in float64 on the tensors' device."""
    assert ours.keys() == exact.keys()
    return {name: float((ours[name].double() - truth).square().mean().sqrt()) for name, truth in exact.items()}


def tensor_bytes(*tensors: Any) -> int:
    """Bytes of the tensors' elements."""
    return sum(x.numel() * x.element_size() for x in tensors)
