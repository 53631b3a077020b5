"""One training step from inside."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch

from cast_kernels.gpu.machine import Machine, Step

#: Steps before any is looked at: they compile and allocate.
_WARM_UP = 3
_STEPS = 10
#: Kernels that are listed, those with the most time first.
_MOST_KERNELS = 40


def host_time(machine: Machine, step: Step) -> dict[str, Any]:
    """Milliseconds until the host has launched a step, and until the GPU has done it.

    The launches of one step must fit into CUDA's queue, or the host waits for the GPU within it. Each step begins with
    an idle GPU.
    """
    for _ in range(_WARM_UP):
        step()
    launched, done = [], []
    for _ in range(_STEPS):
        machine.synchronise()
        begin = time.perf_counter()
        step()
        launched.append(1e3 * (time.perf_counter() - begin))
        machine.synchronise()
        done.append(1e3 * (time.perf_counter() - begin))
    return {
        "ok": None, "host ms": statistics.median(launched), "host ms, least": min(launched),
        "step ms": statistics.median(done), "step ms, least": min(done),
    }  # fmt: skip


def profile(machine: Machine, step: Step) -> dict[str, Any]:
    """The kernels of one step by time on the GPU, and how many launches it makes."""
    for _ in range(_WARM_UP):
        step()
    machine.synchronise()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if machine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        machine.synchronise()
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = [event for event in profiler.key_averages() if event.device_type == on_gpu]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    for event in kernels[:_MOST_KERNELS]:
        print(f"{event.self_device_time_total / 1e3:9.3f} ms {event.count:6d} x  {event.key}")
    top = [[event.key[:120], event.count, event.self_device_time_total / 1e3] for event in kernels]
    return {
        "ok": None, "kernels": sum(count for _, count, _ in top), "kernel ms": sum(ms for _, _, ms in top),
        "top": top[:_MOST_KERNELS],
    }  # fmt: skip


def loaded(machine: Machine) -> dict[str, Any]:
    """Registers and spills of every kernel of ours that this process has loaded, as the driver says them."""
    found = []
    for function in _functions():
        for cache in function.device_caches.values():
            for kernel in cache[0].values():
                about = kernel.metadata
                found.append([about.name, kernel.n_regs, kernel.n_spills, about.shared, about.num_warps])
    for row in sorted(found, key=lambda row: (row[0], -(row[2] or 0))):
        print("kernel {}: {} registers, {} words spilled, {} bytes shared, {} warps".format(*row))
    spilled = [row for row in found if row[2]]
    return {"ok": None, "kernels": len(found), "that spill": len(spilled), "loaded": found}


def _functions() -> list[Any]:
    from triton.runtime.jit import JITFunction

    # Not isinstance: PyTorch has objects that import or warn when they are asked for their class.
    return [x for x in gc.get_objects() if type(x) is JITFunction and x.module.startswith("cast_kernels.")]
