"""One launch of a compiled CUDA module, with the contents of the memory that it may touch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ptx_emulator.core.errors import Trap, Unsupported
from ptx_emulator.core.kernel import Module
from ptx_emulator.core.launch import Report, launch
from ptx_emulator.core.memory import Memory
from ptx_emulator.core.parameters import Argument
from ptx_emulator.core.parser import parse
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.tensor_maps import TensorMap


@dataclass(frozen=True)
class Pointer:
    """An address in a buffer of the record."""

    buffer: str  #: its name
    offset: int = 0  #: bytes behind the buffer's beginning


@dataclass(frozen=True)
class Tiled:
    """A tensor map by what `cuTensorMapEncodeTiled` was given; `TensorMap` says what each field means."""

    start: Pointer  #: of the tensor's first element
    type: str  #: of the elements, such as "bf16"
    sizes: tuple[int, ...]  #: elements along each dimension, innermost first
    strides: tuple[int, ...]  #: bytes, of each dimension but the innermost
    box: tuple[int, ...]  #: elements along each dimension
    swizzle: int = 0  #: bytes
    fill: str = "zero"  #: "zero" or "nan"


@dataclass(frozen=True)
class Struct:
    """The raw bytes of a parameter, in which addresses and tensor maps lie."""

    data: bytes  #: as the launch passed them
    inside: Mapping[int, Pointer | Tiled] = field(default_factory=dict)  #: byte -> what lies there in place of the data


Given = int | float | bytes | Pointer | Tiled | Struct


@dataclass(frozen=True)
class Record:
    """A launch: what `cuLaunchKernelEx` is given, and the memory behind its addresses."""

    ptx: str  #: text of the module
    kernel: str  #: name of the entry
    grid: tuple[int, int, int]  #: CTAs
    block: tuple[int, int, int]  #: threads of a CTA
    arguments: tuple[Given, ...]  #: one for each parameter
    buffers: Mapping[str, Array]  #: global memory by name: contiguous arrays of any type
    shared_bytes: int = 0  #: dynamic shared memory
    cluster: tuple[int, int, int] | None = None  #: CTAs of a cluster; None: what the kernel requires, else 1
    target: str = "sm_90"  #: what it runs as
    offsets: Mapping[str, int] = field(default_factory=dict)  #: bytes that a buffer begins behind a multiple of 256


@lru_cache(maxsize=64)
def _module(ptx: str) -> Module:
    return parse(ptx)


def run(
    record: Record,
    *,
    landing: str = "late",
    seed: int | None = None,
    checks: bool = True,
    ctas: list[int] | None = None,
    engine: str | None = None,
    lane_order: bool = False,
) -> Report:
    """Execute a recorded launch, and write what the kernel wrote to those of the record's buffers that are writable.

    Args:
        record: the launch.
        landing, seed, checks, ctas, engine, lane_order: as of `ptx_emulator.launch`.

    Raises:
        KeyError: the module has no such kernel, or the record no such buffer.
        ValueError: a bad launch, buffer or tensor map.
        Unsupported: a block of more than one dimension.
        EmulationError: another of them, where the kernel goes wrong.
    """
    kernels = _module(record.ptx).kernels
    if record.kernel not in kernels:
        raise KeyError(f"no kernel {record.kernel!r} in the module; it has {', '.join(kernels)}")
    if record.block[1:] != (1, 1):
        raise Unsupported(f"unsupported: a block of {record.block} threads has more than one dimension")
    memory = Memory()
    places = {
        name: memory.register(_bytes(name, array), name, record.offsets.get(name, 0))
        for name, array in record.buffers.items()
    }
    try:
        report = launch(
            kernels[record.kernel],
            grid=record.grid,
            threads=record.block[0],
            arguments=[_argument(one, places) for one in record.arguments],
            memory=memory,
            shared_bytes=record.shared_bytes,
            target=record.target,
            clusters=record.cluster,
            landing=landing,
            seed=seed,
            checks=checks,
            ctas=ctas,
            engine=engine,
            lane_order=lane_order,
        )
    except Trap:  # the host reads what was written before it
        memory.write_back()
        raise
    memory.write_back()
    return report


def _bytes(name: str, array: Array) -> Array:
    if not array.flags.c_contiguous:
        raise ValueError(f"buffer {name!r} is not contiguous: pass a copy of it")
    return array.reshape(-1).view(np.uint8)


def _argument(given: Given, places: Mapping[str, int]) -> Argument:
    """What `launch` takes for it."""
    if isinstance(given, Pointer):
        return _address(given, places)
    if isinstance(given, Tiled):
        return _tensor_map(given, places)
    if not isinstance(given, Struct):
        return given
    data = bytearray(given.data)
    for at, what in given.inside.items():
        packed = (
            _address(what, places).to_bytes(8, "little")
            if isinstance(what, Pointer)
            else _tensor_map(what, places).pack()
        )
        if not 0 <= at <= len(data) - len(packed):
            raise ValueError(f"{what} at byte {at} lies outside the {len(data)} bytes of its parameter")
        data[at : at + len(packed)] = packed
    return bytes(data)


def _address(pointer: Pointer, places: Mapping[str, int]) -> int:
    if pointer.buffer not in places:
        raise KeyError(f"no buffer {pointer.buffer!r} in the record; it has {', '.join(places)}")
    return places[pointer.buffer] + pointer.offset


def _tensor_map(tile: Tiled, places: Mapping[str, int]) -> TensorMap:
    start = _address(tile.start, places)
    return TensorMap(start, tile.type, tile.sizes, tile.strides, tile.box, tile.swizzle, tile.fill)
