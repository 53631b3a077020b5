"""Launches of the CUDA kernels, taken in place of the driver: executed by the emulator, or only kept.

Grids, arguments and tensor maps are those that csrc/cuda makes for a GPU; the PTX is the one from which its machine
code was assembled. Nothing here asks for a driver.
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
#: No access needs more: a buffer begins as far behind a multiple of this as the memory that it stands for.
_ALIGNMENT = 16


@dataclass(frozen=True)
class CudaLaunch:
    """One launch, as csrc/cuda hands it to a recorder."""

    kernel: str
    grid: tuple[int, int, int]  # CTAs
    threads: int  # of a CTA
    cluster: int  # CTAs
    shared_bytes: int  # dynamic, of a CTA
    argument: bytes  # the kernel's only one; its tensor maps are empty
    places: tuple[Mapping[str, Any], ...]  # what lies in the argument besides plain numbers
    target: Target

    def record(self) -> Record:
        """The same with the memory behind its addresses, which the record's buffers view.

        Addresses whose bytes overlap are one buffer; around each lies nothing that the kernel may touch.

        Raises:
            KeyError: the module has no such kernel, so that a GPU could not launch it either.
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
        """Raise EmulationFault if it faulted, or if several warps wrote values to one word that differ."""
        if found := [*self.report.faults, *(note for note in self.report.notes if note.differs)]:
            raise EmulationFault(self.launch, found)


@contextmanager
def kept(name: str = "sm_90") -> Iterator[list[CudaLaunch]]:
    """All launches inside go into the list, and none is executed.

    Raises:
        RuntimeError: the CUDA kernels are not built, or launches are taken already.
    """
    launches: list[CudaLaunch] = []
    with taken(launches.append, name):
        yield launches


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Launches inside are counted in C++ and reach neither a driver nor Python; calling the result tells how many.

    Raises:
        RuntimeError: the CUDA kernels are not built, or launches are taken already.
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
    """The emulator executes all launches inside, on the memory that they name; the list has them with their reports.

    Args:
        name: of the target.
        landing, seed, checks, engine, lane_order: as of `ptx_emulator.launch`.
        folder: where each launch is written as a record, before it is executed: `00_bcast_prepare_bf16_bf16.npz`.

    Raises:
        EmulationFault: at a launch that faults, or in which several warps wrote values to one word that differ.
        RuntimeError: a kernel has what the emulator does not execute; the CUDA kernels are not built, or launches are
            taken already.
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
    """Execute one launch on the memory that it names; what was found is in the report.

    Args:
        launch: what to run.
        file: where it is written as a record before.
        options: as of `ptx_emulator.launch`.

    Raises:
        EmulationFault: an error ended the launch.
        RuntimeError: the kernel has what the emulator does not execute.
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
    """All launches inside go to this function, which may raise; `name` is that of the target.

    Raises:
        RuntimeError: the CUDA kernels are not built, or launches are taken already.
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
    """The native module, whose launches nobody takes."""
    kernels = _native.cuda()
    if kernels.is_recorded():
        raise RuntimeError("launches of the CUDA kernels are taken already: leave the other `with` first")
    return kernels


def _spans(places: tuple[Mapping[str, Any], ...]) -> list[tuple[int, int]]:
    """[start, stop) of the memory that some places name, those that overlap as one."""
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
    """What lies at a place: a pointer, or the tensor map that the driver would encode there."""
    if "box" not in place:
        return pointer
    name, size = _TYPES[place["type"]]
    return Tiled(pointer, name, place["sizes"], (place["sizes"][0] * size,), place["box"], swizzle=128)
