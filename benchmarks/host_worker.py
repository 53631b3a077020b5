"""Time one tree's host code on demand; each of our launches calls a function that only counts.

    python host_worker.py CACHE     # with the tree first in PYTHONPATH

Each line of stdin, "WORK REPEATS" or "eager WORK", is answered by a line of JSON. `bench_host.py` starts one worker for
this tree and one for the older commit, and asks them in turn. PyTorch's own operators do run, on the smallest tensors
that need the same launches.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

TARGET = "sm_90"
#: B-CAST's smallest sizes with both directions and windows, positions, and products in parts, so that `sum_parts` runs.
EXCHANGE: dict[str, Any] = {"dim": 64, "bottleneck_dim": 32, "num_heads": 2, "num_frames": 8, "num_patches": 16}
#: CAST-B's twelve blocks with the smallest sizes, because PyTorch's products on a CPU take part of the time.
MODEL: dict[str, Any] = {
    "image_size": 8, "patch_size": 8, "num_frames": 2, "embed_dim": 16, "depth": 12, "num_heads": 1, "mlp_ratio": 1.0,
    "adapter_ratio": 1.0, "down_ratio": 1.0,
}  # fmt: skip
#: Operators without a launch on a GPU, in addition to views.
_SILENT = ("empty", "detach", "new_empty", "empty_like", "empty_strided")

Step = Callable[[], object]


def exchange(backend: str, autocast: bool, backward: bool) -> Step:
    """B-CAST in bf16, or in fp32 under autocast."""
    import cast_kernels

    dtype = torch.float32 if autocast else torch.bfloat16
    module = cast_kernels.BCAST(**EXCHANGE, backend=backend).to(dtype)
    frames, patches, dim = EXCHANGE["num_frames"], EXCHANGE["num_patches"], EXCHANGE["dim"]
    streams = [torch.randn(1, frames, patches + cls, dim).to(dtype).requires_grad_(backward) for cls in (1, 0)]
    grads = [torch.randn_like(x, requires_grad=False) for x in streams]
    leaves = [*streams, *module.parameters()]

    def step() -> object:
        with torch.set_grad_enabled(backward), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = module(*streams)
        return torch.autograd.grad(outputs, leaves, grads) if backward else outputs

    return step


def training(backend: str) -> Step:
    """A step of the model: fp32 parameters, autocast, a loss, backward, AdamW in one call."""
    import cast
    import cast_kernels

    # "auto" depends on the device, and this is a CPU. This is each tree's default on a GPU with enough memory.
    level = "nothing" if hasattr(cast_kernels, "recompute") else "cheap"
    model = cast.CAST(**MODEL, recompute=level).fuse(backend).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    video = torch.randn(1, 3, MODEL["num_frames"], MODEL["image_size"], MODEL["image_size"])

    def step() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(video)
        torch.stack([x.float().logsumexp(-1).sum() for x in logits.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return None

    return step


WORK: Mapping[str, Callable[[str], Step]] = {
    "B-CAST forward": lambda backend: exchange(backend, autocast=False, backward=False),
    "B-CAST forward + backward": lambda backend: exchange(backend, autocast=False, backward=True),
    "B-CAST forward, AMP": lambda backend: exchange(backend, autocast=True, backward=False),
    "B-CAST forward + backward, AMP": lambda backend: exchange(backend, autocast=True, backward=True),
    "CAST-B training step, AMP": training,
}


class Operators(TorchDispatchMode):
    """Counts PyTorch's operators, and those that launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.launching = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.launching += not func.is_view and func.overloadpacket.__name__ not in _SILENT
        return func(*args, **kwargs or {})


def microseconds(step: Step, repeats: int) -> float:
    """Microseconds of one step, as the mean of `repeats`. The process's own time excludes other users of the core."""
    begin = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - begin) / repeats * 1e6


def eager(work: str) -> dict[str, float]:
    """Numbers of eager PyTorch's operators and launches in a step, and microseconds of one operator on tensors of size
    one.
    """
    step = WORK[work]("eager")
    step()
    with Operators() as counted:
        step()
    one = torch.ones(1)
    operator = min(microseconds(lambda: one + one, 1000) for _ in range(20))
    return {"operators": counted.all, "launches": counted.launching, "operator_us": operator}


def driver_of_the_tree() -> tuple[Any, Any]:
    """The modules with the tree's driver and targets; the older commit has them in another package."""
    here = find_spec("ptx_emulator") and find_spec("ptx_emulator.triton")
    driving, targets = ("ptx_emulator.triton", "ptx_emulator") if here else ("cast_kernels.evidence",) * 2
    return import_module(f"{driving}.driver"), import_module(f"{targets}.targets")


def serve(cache: Path) -> None:
    """Answer until stdin ends."""
    import triton

    driving, targets = driver_of_the_tree()
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # it would spend a millisecond on preparing each product
    count = [0]

    def launch(*_: Any) -> None:
        count[0] += 1

    launcher = SimpleNamespace(enforces_limits=False, launch=None)
    with driving.offline_driver(targets.target(TARGET), launcher, cache):
        driver = triton.runtime.driver.active
        driver.takes_tensors = False  # addresses, as for a GPU's driver
        driver.launcher_cls = lambda source, metadata: launch
        steps: dict[str, Step] = {}
        for line in sys.stdin:
            work, repeats = line.rstrip("\n").rsplit(" ", 1)
            if line.startswith("eager "):
                answer = eager(line[len("eager ") :].rstrip("\n"))
            else:
                if work not in steps:
                    steps[work] = WORK[work]("triton")
                    for _ in range(3):  # compiles, and fills the caches
                        steps[work]()
                count[0] = 0
                answer = {"us": microseconds(steps[work], int(repeats)), "launches": count[0] / int(repeats)}
                answer["recorder_us"] = microseconds(lambda: launch(*range(20)), 1000)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
