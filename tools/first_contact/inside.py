"""One training step from inside."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from cast_kernels.gpu.machine import Machine, Step
from cast_kernels.gpu.timing import Spread, host, interleave, speedups

#: Warm-up steps, which compile and allocate.
_WARM_UP = 3
#: Most samples of each step, and seconds for all of them.
_SAMPLES, _SECONDS = 20, 4.0
#: Most listed kernels, by time.
_MOST_KERNELS = 40
#: CUDA's queue has room for about 1024 launches. A host that finds it full waits for the GPU. Half of that is safe.
_QUEUE = 512


def host_time(machine: Machine, steps: Mapping[str, Step]) -> dict[str, Any]:
    """Milliseconds until the host has launched a step, timed in turn, and until the GPU has finished it.

    The host's time does not depend on the sizes, so these are small enough for the GPU to keep up. If it did not keep
    up, its queue may have been full, and no host time is reported.

    Args:
        machine: runs the steps.
        steps: name -> step; the result also has the first one's time over the others'.
    """
    for step in steps.values():
        _warm_up(machine, step)
    launched = interleave(host(machine), steps, _SAMPLES, _SECONDS, 0.0)
    done = interleave(machine.elapsed_ms, steps, _SAMPLES, _SECONDS, 0.0)
    found: dict[str, Any] = {"ok": None}
    kept_up = []
    for name, step in steps.items():
        ms, step_ms = Spread.of(launched[name]), Spread.of(done[name])
        launches = sum(count for _, count, _ in _kernels(machine, step))
        behind = round(launches * max(0.0, 1 - ms.median / step_ms.median))
        found |= {f"{name}: step ms": step_ms.median, f"{name}: launches": launches}
        if behind >= _QUEUE:
            found[f"{name}: no host ms"] = f"the GPU was {behind} launches behind, so the host may have waited for it"
            continue
        kept_up.append(name)
        found |= {f"{name}: host ms": ms.median, f"{name}: host ms, spread": [ms.low, ms.high]}
    for name in kept_up[1:]:
        ratio = speedups(launched[kept_up[0]], launched[name])
        found |= {f"{kept_up[0]} / {name}": ratio.median, f"{kept_up[0]} / {name}, spread": [ratio.low, ratio.high]}
    return found


def _warm_up(machine: Machine, step: Step) -> None:
    for _ in range(_WARM_UP):
        step()
    machine.synchronise()


def _kernels(machine: Machine, step: Step) -> list[tuple[str, int, float]]:
    """(name, launches, milliseconds) of one step's kernels on the GPU, longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if machine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        machine.synchronise()
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = [event for event in profiler.key_averages() if event.device_type == on_gpu]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return [(event.key, event.count, event.self_device_time_total / 1e3) for event in kernels]


def profile(machine: Machine, step: Step) -> dict[str, Any]:
    """The kernels of one step by time on the GPU, and its number of launches."""
    _warm_up(machine, step)
    kernels = _kernels(machine, step)
    for name, count, ms in kernels[:_MOST_KERNELS]:
        print(f"{ms:9.3f} ms {count:6d} x  {name}")
    return {
        "ok": None, "kernels": sum(count for _, count, _ in kernels), "kernel ms": sum(ms for *_, ms in kernels),
        "top": [[name[:120], count, ms] for name, count, ms in kernels[:_MOST_KERNELS]],
    }  # fmt: skip


def loaded(machine: Machine) -> dict[str, Any]:
    """Registers and spills, from the driver, of all our kernels that this process has loaded."""
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

    # Not isinstance: some objects of PyTorch import or warn when it reads their class.
    return [x for x in gc.get_objects() if type(x) is JITFunction and x.module.startswith("cast_kernels.")]
