"""Launches of the CUDA kernels in which `ptx_mutants.py --cuda` plants faults: those of one small step, cut short.

The PTX, the argument and the memory of each are the product's own, as the recorder takes them. The problem is small,
and yet a cluster has a whole tile, a part of one and empty ones, and every ring goes round more than once, but for that
of O's rows, of which 192 channels have three. Of the row kernels the first cluster runs, which asks and answers and has
CLS; of `weight_gradient` two clusters, between which a pair of tiles is cut.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from cuda_cases import call, multiprocessors
from ptx_emulator import EmulationError, cuda
from ptx_emulator.cuda import Given, Pointer, Record, Struct, Tiled
from ptx_emulator.mutants import Subject
from ptx_emulator.mutants.judge import EARLY_FIRST

from cast_kernels.evidence.cases import KINDS, Case, poisoned_memory, run
from cast_kernels.evidence.cuda_launches import CudaLaunch, emulated

#: Too few to share columns among CTAs: the first cluster of a row kernel computes all of them.
MULTIPROCESSORS = 4
STEP = Case(batch=1, frames=3, patches=30, dim=264, bottleneck=192, heads=6, scaled=True, recompute="cheap")

#: kernel -> clusters that run; all where there is none
CLUSTERS = {
    "project": 1, "exchange": 1, "project_again": 1, "exchange_backward": 1, "project_backward": 1,
    "weight_gradient": 2,
}  # fmt: skip
KERNELS = (
    "prepare", "project", "attention", "exchange", "project_again", "exchange_backward", "attention_backward",
    "project_backward", "weight_gradient", "finish",
)  # fmt: skip
#: taken from a call of forward alone
OF_FORWARD = ("prepare", "project", "attention", "exchange")


def short_name(kernel: str) -> str:
    """`exchange_backward` of `bcast_exchange_backward_bf16_bf16_192`."""
    found = re.fullmatch(r"bcast_([a-z_]+?)(?:_(?:bf16|fp16|fp32|\d+))*", kernel)
    assert found is not None
    return found[1]


def _recorded(step: Callable[[], object]) -> list[tuple[CudaLaunch, Record]]:
    """The launches of a step with the memory that each met."""
    with tempfile.TemporaryDirectory() as folder:
        with emulated(landing="early", folder=Path(folder)) as ran, poisoned_memory():
            step()
        records = [cuda.load(path) for path in sorted(Path(folder).iterdir())]
    return [(one.launch, record) for one, record in zip(ran, records, strict=True)]


def _types(launches: Sequence[CudaLaunch]) -> dict[int, str]:
    """Address -> type of what lies there, as far as a tensor map of some launch says so."""
    return {place["address"]: place["type"] for one in launches for place in one.places if "box" in place}


def _renamed(record: Record, names: dict[str, str]) -> Record:
    """Buffers by other names than their addresses, which are others in each process."""

    def moved(given: Given) -> Given:
        if isinstance(given, Pointer):
            return replace(given, buffer=names[given.buffer])
        if isinstance(given, Tiled):
            return replace(given, start=replace(given.start, buffer=names[given.start.buffer]))
        assert isinstance(given, Struct)
        return replace(given, inside={at: moved(what) for at, what in given.inside.items()})

    return replace(
        record,
        arguments=tuple(moved(one) for one in record.arguments),
        buffers={names[name]: array for name, array in record.buffers.items()},
        offsets={names[name]: offset for name, offset in record.offsets.items()},
    )


def _copied(record: Record) -> Record:
    return replace(record, buffers={name: array.copy() for name, array in record.buffers.items()})


def _used_maps(record: Record) -> Record:
    """The record without those tensor maps that none of its CTAs uses: the other stream's, and roles that it lacks."""
    (struct,) = record.arguments
    assert isinstance(struct, Struct)
    inside = dict(struct.inside)
    for at in [at for at, what in inside.items() if isinstance(what, Tiled)]:
        without = replace(struct, inside={place: what for place, what in inside.items() if place != at})
        try:
            cuda.run(_copied(replace(record, arguments=(without,))), landing="early", checks=False)
        except EmulationError:
            continue
        inside = without.inside
    return replace(record, arguments=(replace(struct, inside=inside),))


def subject(launch: CudaLaunch, record: Record, types: dict[int, str]) -> Subject:
    """A launch with what it writes, each buffer under the byte of the argument that names it first."""
    name, names = short_name(launch.kernel), {}
    for at, what in sorted(record.arguments[0].inside.items()):
        names.setdefault((what if isinstance(what, Pointer) else what.start).buffer, f"argument + {at}")
    kept = {names[one]: types.get(int(one, 16), "bf16" if name == "finish" else "fp32") for one in record.buffers}
    record = _renamed(record, names)
    record = replace(record, buffers={
        one: array.view(np.float32 if kept[one] == "fp32" else np.uint16) for one, array in record.buffers.items()
    })  # fmt: skip
    if name in CLUSTERS:
        record = replace(record, grid=(CLUSTERS[name] * launch.cluster, 1, 1))
        record = _used_maps(record)
    after = _copied(record)
    cuda.run(after, landing="early")
    outputs = {
        one: "bf16" if kept[one] == "bf16" else ""
        for one, array in record.buffers.items()
        if array.tobytes() != after.buffers[one].tobytes()
    }
    return Subject(f"{name}, cuda", record, outputs, runs=EARLY_FIRST)


def forward() -> None:
    """A call of forward alone, which keeps h: `exchange` has most to do."""
    call(replace(STEP, backward=False), "bf16", "nothing").forward(MULTIPROCESSORS)


def step() -> None:
    """Forward and backward through the public op."""
    with multiprocessors(MULTIPROCESSORS):
        run(STEP, "cuda", **KINDS["bf16"]._asdict())


@cache
def _launches(step: Callable[[], object]) -> tuple[dict[str, tuple[CudaLaunch, Record]], dict[int, str]]:
    """(the first launch of each kernel of a step, types of what lies in memory)."""
    launches = _recorded(step)
    first = {short_name(launch.kernel): (launch, record) for launch, record in reversed(launches)}
    return first, _types([launch for launch, _ in launches])


def cuda_subject(name: str) -> Subject:
    """The launch of a kernel, by its short name."""
    launches, types = _launches(forward if name in OF_FORWARD else step)
    return subject(*launches[name], types)


#: name -> what makes it
CUDA_SUBJECTS: dict[str, Callable[[], Subject]] = {f"{name}, cuda": partial(cuda_subject, name) for name in KERNELS}
