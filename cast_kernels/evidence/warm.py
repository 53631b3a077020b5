"""`cast-kernels compile --cache`: what a CAST-B launches, compiled ahead into Triton's own cache.

The first step on a GPU otherwise waits for it. The launches are the product's own, with its streams in float32 and
autocast as `cast train` has it, and Triton makes the key of each kernel: so a process on that GPU finds what it looks
for, if it has the same Triton and the same source.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import triton
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Recorder, offline_driver

from cast_kernels.evidence.cases import DTYPES
from cast_kernels.evidence.parts import Model, parts
from cast_kernels.evidence.unrun import Unrun

#: Training and inference: many rows and few, for which tables have other tiles, at the levels that "auto" takes.
MODELS = tuple(
    Model(batch=batch, training=level != "", recompute=level or "cheap", drop_path=0.2 if level else 0.0)
    for batch in (6, 1)
    for level in ("nothing", "cheap", "")
)


def fill(name: str, dtype: str, model: Model, cache: Path) -> int:
    """Compile what one step of the model launches, and return how many kernels that are.

    Args:
        name: of the target.
        dtype: of autocast, a key of :data:`~cast_kernels.evidence.cases.DTYPES`.
        model: the sizes, and whether it trains.
        cache: folder that Triton looks into.
    """
    with offline_driver(target(name), Recorder(), cache) as recorder:
        for part in parts(model, "triton"):
            with Unrun(), torch.set_grad_enabled(model.training):
                outputs = part.forward(DTYPES[dtype])
                if model.training:
                    part.backward(outputs)
    return len(recorder.records)


def main(
    names: Sequence[str] | None, dtypes: Sequence[str] | None, models: Sequence[Model] = MODELS,
    cache: Path | None = None,
) -> int:  # fmt: skip
    """Compile with one process a core, say how far it is, and return the exit code.

    Args:
        names: of targets; None is the GPU of this machine.
        dtypes: of autocast; None is bf16.
        models: their launches.
        cache: None is Triton's own folder, where every later process on this machine looks.

    Raises:
        RuntimeError: no target was named, and there is no GPU.
        ValueError: no such target.
    """
    goals = [target(name).name for name in names or [present()]]
    folder = cache or Path(triton.knobs.cache.dir)
    jobs = [(goal, dtype, model, folder) for goal in goals for dtype in dtypes or ("bf16",) for model in models]
    # Steps share kernels, and two that start together would compile them twice: the largest step goes first, alone.
    done = 0
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        for waiting in (jobs[:1], jobs[1:]):
            for future in as_completed([pool.submit(fill, *job) for job in waiting]):
                future.result()
                done += 1
                print(f"compiled {done} of {len(jobs)} kinds of steps", file=sys.stderr, flush=True)
    print(f"{', '.join(goals)}: kernels of CAST-B are in {folder}")
    return 0


def present() -> str:
    """The GPU of this machine, as targets are named.

    Raises:
        RuntimeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here; say --target sm_90, or another, to fill the cache for that one")
    return "sm_{}{}".format(*torch.cuda.get_device_capability())
