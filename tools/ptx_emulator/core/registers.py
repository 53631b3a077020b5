"""The first values of a batch's registers: poison, immediates, and the predefined registers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_emulator.core.decode import Decoder
from ptx_emulator.core.spaces import SHARED_BASE, UNSIGNED, Array
from ptx_emulator.core.state import State

POISON = 0x7FFF_7FFF_7FFF_7FFF  # NaN as f64, as f32, and in every half as f16 and bf16


def first_registers(m: State, decoder: Decoder, grid: tuple[int, int, int]) -> list[Any]:
    """An array per register number of the program."""
    poison = {size: np.full((1, 1), POISON & ((1 << 8 * size) - 1), UNSIGNED[size]) for size in UNSIGNED}
    off = np.zeros((1, 1), bool)
    registers: list[Any] = [off if p else poison[w] for p, w in zip(decoder.predicate, decoder.widths, strict=True)]
    registers += [off] * (decoder.count - len(registers))
    for number, value in decoder.constants.items():
        registers[number] = value
    for number, name in decoder.specials.items():
        registers[number] = special(m, decoder, name, grid)
    return registers


def special(m: State, decoder: Decoder, name: str, grid: tuple[int, int, int]) -> Array:
    """The value of a predefined register. Blocks have one dimension."""
    thread = np.arange(m.threads, dtype=np.uint32)[None, :]
    lane = thread % 32
    one = np.ones((1, 1), np.uint32)
    dynamic = m.shared_end - SHARED_BASE - decoder.dynamic_offset
    table: dict[str, Callable[[], Any]] = {
        "tid.x": lambda: thread,
        "ntid.x": lambda: one * m.threads,
        "laneid": lambda: lane,
        "warpid": lambda: thread // 32,
        "nwarpid": lambda: one * m.warps,
        "dynamic_smem_size": lambda: one * max(dynamic, 0),
        "total_smem_size": lambda: one * (m.shared_end - SHARED_BASE),
        "lanemask_eq": lambda: np.uint32(1) << lane,
        "lanemask_lt": lambda: (np.uint32(1) << lane) - np.uint32(1),
        "lanemask_le": lambda: (np.uint32(2) << lane) - np.uint32(1),
        "lanemask_gt": lambda: ~((np.uint32(2) << lane) - np.uint32(1)),
        "lanemask_ge": lambda: ~((np.uint32(1) << lane) - np.uint32(1)),
        "cluster_nctarank": lambda: one * m.cluster,
        "cluster_ctarank": lambda: np.arange(m.ctas)[:, None] % m.cluster if m.cluster > 1 else one * 0,
    }
    geometry = _geometry(m, grid)
    if name in geometry:
        return geometry[name].astype(np.uint32)
    if name in table:
        return np.asarray(table[name]()).astype(np.uint32)
    return one if name.startswith("ntid") else np.zeros((1, 1), np.uint32)


def _geometry(m: State, grid: tuple[int, int, int]) -> dict[str, Array]:
    """Where each CTA is in the grid and in its cluster."""
    number, one = m.cta_numbers[:, None], np.ones((1, 1), np.int64)
    places = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
    found: dict[str, Array] = {}
    for axis, place, count, size in zip("xyz", places, grid, m.cluster_shape, strict=True):
        found |= {
            f"ctaid.{axis}": place,
            f"nctaid.{axis}": one * count,
            f"cluster_ctaid.{axis}": place % size if size > 1 else one * 0,
            f"cluster_nctaid.{axis}": one * size,
            f"clusterid.{axis}": place // size,
            f"nclusterid.{axis}": one * (count // size),
        }
    return found
