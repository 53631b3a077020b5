"""The first values of a batch's registers: poison, immediates, and the predefined registers."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_emulator.decode import SHARED_BASE, UNSIGNED, Array

if TYPE_CHECKING:
    from ptx_emulator.execute import Machine

POISON = 0x7FFF_7FFF_7FFF_7FFF  # NaN as f64, as f32, and in every half as f16 and bf16


def first_registers(m: "Machine", grid: tuple[int, int, int]) -> list[Any]:
    """An array per register number of the program."""
    decoder = m.program.decoder
    poison = {size: np.full((1, 1), POISON & ((1 << 8 * size) - 1), UNSIGNED[size]) for size in UNSIGNED}
    off = np.zeros((1, 1), bool)
    registers: list[Any] = [off if p else poison[w] for p, w in zip(decoder.predicate, decoder.widths, strict=True)]
    registers += [off] * (decoder.count - len(registers))
    for number, value in decoder.constants.items():
        registers[number] = value
    for number, name in decoder.specials.items():
        registers[number] = special(m, name, grid)
    return registers


def special(m: "Machine", name: str, grid: tuple[int, int, int]) -> Array:
    """The value of a predefined register. Blocks have one dimension; a cluster holds one CTA."""
    thread = np.arange(m.threads, dtype=np.uint32)[None, :]
    number = m.cta_numbers[:, None]
    lane = thread % 32
    one = np.ones((1, 1), np.uint32)
    dynamic = m.shared_end - SHARED_BASE - m.program.decoder.dynamic_offset
    table: dict[str, Callable[[], Any]] = {
        "tid.x": lambda: thread,
        "ntid.x": lambda: one * m.threads,
        "ctaid.x": lambda: number % grid[0],
        "ctaid.y": lambda: number // grid[0] % grid[1],
        "ctaid.z": lambda: number // (grid[0] * grid[1]),
        "nctaid.x": lambda: one * grid[0],
        "nctaid.y": lambda: one * grid[1],
        "nctaid.z": lambda: one * grid[2],
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
        "cluster_nctarank": lambda: one,
    }
    if name in table:
        return np.asarray(table[name]()).astype(np.uint32)
    if name.startswith("clusterid"):
        return special(m, name.replace("clusterid", "ctaid"), grid)
    return one if name.startswith(("ntid", "cluster_nctaid")) else np.zeros((1, 1), np.uint32)
