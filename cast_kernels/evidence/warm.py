"""`cast-kernels compile --cache`: compile the kernels of a CAST-B ahead, into Triton's own cache.

Otherwise the first step on a GPU waits for the compiler. The launches are the product's own, with streams in float32
and the autocast of `cast train`. Triton itself makes each kernel's key. So a process on that GPU finds the kernels if
it has the same Triton and the same source.
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

#: Training and inference; many rows and few, because tables have separate tiles for few; at the levels of "auto".
MODELS = tuple(
    Model(batch=batch, training=level != "", recompute=level or "cheap", drop_path=0.2 if level else 0.0)
    for batch in (6, 1)
    for level in ("nothing", "cheap", "")
)


def fill(name: str, dtype: str, model: Model, cache: Path) -> int:
    """Compile the kernels of one step of the model; returns their number.

    Args:
        name: of the target.
        dtype: of autocast, a key of :data:`~cast_kernels.evidence.cases.DTYPES`.
        model: the sizes, and whether it trains.
        cache: Triton's cache folder.
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
    """Compile with one process per core, report the progress, and return the exit code.

    Args:
        names: of targets; None for this machine's GPU.
        dtypes: of autocast; None is bf16.
        models: the kernels of these models are compiled.
        cache: None for Triton's own folder, which every later process on this machine uses.

    Raises:
        RuntimeError: no target was named, and there is no GPU.
        ValueError: no such target.
    """
    goals = [target(name).name for name in names or [present()]]
    folder = cache or Path(triton.knobs.cache.dir)
    jobs = [(goal, dtype, model, folder) for goal in goals for dtype in dtypes or ("bf16",) for model in models]
    # Steps share kernels, and two parallel ones would compile them twice. So the largest step runs first, alone.
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
    """The target's name of this machine's GPU.

    Raises:
        RuntimeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here; say --target sm_90, or another, to fill the cache for that one")
    return "sm_{}{}".format(*torch.cuda.get_device_capability())
