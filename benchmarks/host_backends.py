"""The host's time for B-CAST on backends `cuda` and `triton`, alternately in one process; launches are counted, not
made.

    python benchmarks/host_backends.py [SAMPLES]

For each backend: its own functions, which an op calls below autograd, and the op as a module calls it. The figure is
the least of the samples. A sample is the mean over many steps of this process's time, as in `bench_host.py`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from host_worker import TARGET, Step, driver_of_the_tree, microseconds

import cast_kernels
from cast_kernels import _native
from cast_kernels.ops.bcast import OPERATOR

#: Small tensors, the narrowest bottleneck that both backends have.
SIZES: dict[str, Any] = {"dim": 64, "bottleneck_dim": 192, "num_heads": 6, "num_frames": 8, "num_patches": 16}
BACKENDS = ("cuda", "triton")
REPEATS = 400


def caught(name: str, run: Step) -> Step:
    """A function that repeats the operator's next call of a backend's function."""
    own, calls = getattr(OPERATOR, name), []

    def catch(*inputs: Any) -> Any:
        calls.append(inputs)
        return own(*inputs)

    setattr(OPERATOR, name, catch)
    try:
        run()
    finally:
        delattr(OPERATOR, name)

    def again() -> object:
        with torch._C._AutoDispatchBelowAutograd():
            return own(*calls[0])

    return again


def steps(backend: str, autocast: bool) -> dict[str, Step]:
    """Name -> function to time."""
    dtype = torch.float32 if autocast else torch.bfloat16
    module = cast_kernels.BCAST(**SIZES, backend=backend, recompute="nothing").to(dtype)
    frames, patches, dim = SIZES["num_frames"], SIZES["num_patches"], SIZES["dim"]
    streams = [torch.randn(1, frames, patches + cls, dim).to(dtype).requires_grad_() for cls in (1, 0)]
    leaves, grads = [*streams, *module.parameters()], [torch.randn_like(x, requires_grad=False) for x in streams]

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return module(*streams)

    def both() -> object:
        return torch.autograd.grad(forward(), leaves, grads)

    for _ in range(3):  # compiles, and fills the caches
        both()
    return {
        "backend, forward": caught("forward", both), "backend, backward": caught("backward", both),
        "op, forward": torch.no_grad()(forward), "op, forward + backward": both,
    }  # fmt: skip


def measure(samples: int, show: Callable[[str], object] = print) -> None:
    """Print a line for each function."""
    timed = {(backend, autocast): steps(backend, autocast) for autocast in (False, True) for backend in BACKENDS}
    least: dict[tuple[str, bool, str], float] = {}
    for _ in range(samples):
        for (backend, autocast), those in timed.items():
            for name, step in those.items():
                key = backend, autocast, name
                least[key] = min(least.get(key, float("inf")), microseconds(step, REPEATS))
    for autocast in (False, True):
        for name in timed["cuda", autocast]:
            ours, theirs = (least[backend, autocast, name] for backend in BACKENDS)
            kind = "autocast" if autocast else "bf16"
            show(f"{kind:<9}{name:<24}cuda {ours:6.1f} us  triton {theirs:6.1f} us  ratio {ours / theirs:.2f}")


def main(samples: int) -> None:
    """Measure, with all launches counted and none made."""
    import triton

    driving, targets = driver_of_the_tree()
    torch.set_num_threads(1)
    cache = Path(tempfile.gettempdir()) / "cast-kernels-host"
    launcher = SimpleNamespace(enforces_limits=False, launch=None)
    with driving.offline_driver(targets.target(TARGET), launcher, cache):
        driver = triton.runtime.driver.active
        driver.takes_tensors = False
        driver.launcher_cls = lambda source, metadata: lambda *_: None
        _native.cuda().count_launches()
        measure(samples)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
