"""Launches of the CUDA kernels, intercepted before the driver: executed by the emulator, or only recorded.

csrc/cuda makes the same grids, arguments and tensor maps as for a GPU. The PTX is the one from which the machine code
was assembled. Nothing here needs a driver.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ptx_emulator import EmulationError, ParseError, Report, Unsupported
from ptx_emulator.cuda import Pointer, Record, Struct, Tiled, run, save
from ptx_emulator.targets import Target, target
from ptx_emulator.triton.launcher import EmulationFault

from cast_kernels import _native
from cast_kernels.evidence.cuda_modules import entries

#: Numbers as csrc/cuda names them -> as PTX names them, and bytes of one.
_TYPES = {"bf16": ("bf16", 2), "fp16": ("f16", 2), "fp32": ("f32", 4)}
#: The largest alignment of an access. A buffer's address has the same remainder modulo this as the original memory.
_ALIGNMENT = 16


@dataclass(frozen=True)
class CudaLaunch:
    """One launch, as csrc/cuda passes it to a recorder."""

    kernel: str
    grid: tuple[int, int, int]  # CTAs
    threads: int  # of a CTA
    cluster: int  # CTAs
    shared_bytes: int  # dynamic, of a CTA
    argument: bytes  # the kernel's only one; its tensor maps are empty
    places: tuple[Mapping[str, Any], ...]  # the parts of the argument that are no plain numbers
    target: Target

    def record(self) -> Record:
        """The launch with the memory behind its addresses. The record's buffers are views of this memory.

        Overlapping ranges of addresses become one buffer. The kernel may touch nothing between the buffers.

        Raises:
            KeyError: the module has no such kernel, so a GPU could not launch it either.
        """
        spans = _spans(self.places)
        buffers = {f"{start:#x}": _memory(start, stop) for start, stop in spans}
        pointers = {
            place["address"]: next(
                Pointer(f"{start:#x}", place["address"] - start)
                for start, stop in spans
                if start <= place["address"] < stop
            )
            for place in self.places
        }
        inside = {place["at"]: _given(place, pointers[place["address"]]) for place in self.places}
        return Record(
            entries()[self.kernel].ptx, self.kernel, self.grid, (self.threads, 1, 1),
            (Struct(self.argument, inside),), buffers, self.shared_bytes,
            (self.cluster, 1, 1) if self.cluster > 1 else None, self.target.name,
            {name: int(name, 16) % _ALIGNMENT for name in buffers},
        )  # fmt: skip


class Ran(NamedTuple):
    """A launch that the emulator executed."""

    launch: CudaLaunch
    report: Report
    seconds: float

    def refuse_faults(self) -> None:
        """Raise EmulationFault if the launch faulted, or if several warps wrote different values to one word."""
        if found := [*self.report.faults, *(note for note in self.report.notes if note.differs)]:
            raise EmulationFault(self.launch, found)


@contextmanager
def kept(name: str = "sm_90") -> Iterator[list[CudaLaunch]]:
    """While active, all launches are appended to the list; none is executed.

    Raises:
        RuntimeError: the CUDA kernels are not built, or launches are already intercepted.
    """
    launches: list[CudaLaunch] = []
    with taken(launches.append, name):
        yield launches


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """While active, launches are only counted, in C++; call the result to get their number.

    Raises:
        RuntimeError: the CUDA kernels are not built, or launches are already intercepted.
    """
    kernels = _free()
    try:
        yield kernels.count_launches()
    finally:
        kernels.set_recorder(None)


@contextmanager
def emulated(
    name: str = "sm_90", *, landing: str = "late", seed: int | None = None, checks: bool = True,
    engine: str | None = None, lane_order: bool = False, folder: Path | None = None,
) -> Iterator[list[Ran]]:  # fmt: skip
    """While active, the emulator executes all launches on their memory; the list has them with their reports.

    Args:
        name: of the target.
        landing, seed, checks, engine, lane_order: as in `ptx_emulator.launch`.
        folder: folder for a record of each launch, written before its execution: `00_bcast_prepare_bf16_bf16.npz`.

    Raises:
        EmulationFault: a launch faults, or several warps wrote different values to one word.
        RuntimeError: a kernel has an instruction that the emulator does not support; the CUDA kernels are not built; or
            launches are already intercepted.
    """
    ran: list[Ran] = []
    options: dict[str, Any] = {
        "landing": landing, "seed": seed, "checks": checks, "engine": engine, "lane_order": lane_order
    }  # fmt: skip

    def take(launch: CudaLaunch) -> None:
        file = None if folder is None else folder / f"{len(ran):02d}_{launch.kernel}.npz"
        ran.append(execute(launch, file, **options))
        ran[-1].refuse_faults()

    with taken(take, name):
        yield ran


def execute(launch: CudaLaunch, file: Path | None = None, **options: Any) -> Ran:
    """Execute one launch on its memory; findings are in the report.

    Args:
        launch: the launch.
        file: file for its record, written before the execution.
        options: as in `ptx_emulator.launch`.

    Raises:
        EmulationFault: an error ended the launch.
        RuntimeError: the kernel has an instruction that the emulator does not support.
    """
    record, begin = launch.record(), time.perf_counter()
    if file is not None:
        save(record, file)
    try:
        report = run(record, **options)
    except (Unsupported, ParseError) as error:
        raise RuntimeError(f"{launch.kernel} on {launch.target.name}: {error}") from error
    except EmulationError as error:
        error.args = (f"{error.args[0]}{_native.cuda().told_waits()}", *error.args[1:])
        raise EmulationFault(launch, [error]) from error
    return Ran(launch, report, time.perf_counter() - begin)


@contextmanager
def taken(take: Callable[[CudaLaunch], None], name: str = "sm_90") -> Iterator[None]:
    """While active, this function gets all launches; it may raise. `name` is that of the target.

    Raises:
        RuntimeError: the CUDA kernels are not built, or launches are already intercepted.
    """
    kernels, goal = _free(), target(name)

    def told(given: dict[str, Any]) -> None:
        places = tuple(given.pop("places"))
        take(CudaLaunch(**given | {"grid": (given["grid"], 1, 1)}, places=places, target=goal))

    kernels.set_recorder(told)
    try:
        yield
    finally:
        kernels.set_recorder(None)


def _free() -> Any:
    """The native module; raises if its launches are already intercepted."""
    kernels = _native.cuda()
    if kernels.is_recorded():
        raise RuntimeError("launches of the CUDA kernels are taken already: leave the other `with` first")
    return kernels


def _spans(places: tuple[Mapping[str, Any], ...]) -> list[tuple[int, int]]:
    """[start, stop) of the memory of some places; overlapping ranges are merged."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((place["address"], place["address"] + place["bytes"]) for place in places):
        if merged and start < merged[-1][1]:
            before = merged.pop()
            start, stop = before[0], max(before[1], stop)
        merged.append((start, stop))
    return merged


def _memory(start: int, stop: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * (stop - start)).from_address(start))


def _given(place: Mapping[str, Any], pointer: Pointer) -> Pointer | Tiled:
    """The content of a place: a pointer, or the tensor map that the driver would encode there."""
    if "box" not in place:
        return pointer
    name, size = _TYPES[place["type"]]
    return Tiled(pointer, name, place["sizes"], (place["sizes"][0] * size,), place["box"], swizzle=128)
