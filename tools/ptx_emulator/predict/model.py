"""The speed model: a kernel takes at least as long as each thing that it uses a multiprocessor or the memory for.

    cycles           = max(tensor, shared memory and L1, issue), each summed over the busiest multiprocessor's CTAs
    time             = max(cycles / clock, L2 bytes / bandwidth, DRAM bytes / bandwidth)

This is a lower bound, good for ranking. The model has everything inside of a kernel overlap, nothing wait for latency,
and no gap between launches. Its times are predicted, never measured.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ptx_emulator.predict.counters import SECTOR, Counters
from ptx_emulator.predict.devices import Device
from ptx_emulator.predict.resources import Resources

#: Sectors that L1 hands over in a clock: a wavefront of shared memory is 128 bytes.
_SECTORS_PER_CLOCK = 4
#: Schedulers of a multiprocessor: each issues one warp instruction a clock.
_SCHEDULERS = 4


@dataclass(frozen=True)
class Prediction:
    """One launch on one device. Times are microseconds that each ceiling alone would allow."""

    kernel: str
    grid: tuple[int, int, int]
    ctas_per_sm: int  # that fit at once
    waves: float  # CTAs over all those that fit at once
    tensor: float
    shared: float
    issue: float
    l2: float
    dram: float
    flops: float  # executed, with padding and repetition
    dram_bytes: float
    floor: float  # roofline: the larger of FLOP / peak and DRAM bytes / bandwidth
    why_not: str = ""  # the reason why this launch would fail

    @property
    def us(self) -> float:
        return max(getattr(self, name) for name in CEILINGS)

    @property
    def bound_by(self) -> str:
        return max(CEILINGS, key=lambda name: getattr(self, name))


#: Ceilings, as fields of :class:`Prediction`.
CEILINGS = ("tensor", "shared", "issue", "l2", "dram")


def predict(
    kernel: str, grid: tuple[int, int, int], used: Resources, ctas: Sequence[Counters], code_ratio: float,
    bytes_moved: int, device: Device,
) -> Prediction:  # fmt: skip
    """How long a launch takes at least.

    Args:
        kernel: its name.
        grid: CTAs along x, y and z.
        used: what its compiled kernel takes of a multiprocessor.
        ctas: what single CTAs execute; each stands for an equal share of the grid, in its order.
        code_ratio: machine instructions for one of PTX.
        bytes_moved: that DRAM must move at least.
        device: must have the target that the kernel was compiled for.
    """
    number = grid[0] * grid[1] * grid[2]
    us = 1e6 / device.clock
    needs = [
        (
            tensor_cycles(one, device),
            one.shared_wavefronts + one.load_sectors / _SECTORS_PER_CLOCK,
            one.warp_instructions * code_ratio / _SCHEDULERS,
        )
        for one in ctas
    ]
    tensor, shared, issue = busiest([needs[i * len(ctas) // number] for i in range(number)], device.target.processors)
    flops = sum(one.flops for one in ctas) * number / len(ctas)
    sectors = sum(one.load_sectors + one.store_sectors for one in ctas) * number / len(ctas)
    limit = device.target.shared_limit
    return Prediction(
        kernel=kernel,
        grid=grid,
        ctas_per_sm=used.ctas,
        waves=number / (device.target.processors * max(used.ctas, 1)),
        tensor=us * tensor,
        shared=us * shared,
        issue=us * issue,
        l2=1e6 * sectors * SECTOR / device.l2,
        dram=1e6 * bytes_moved / device.dram,
        flops=flops,
        dram_bytes=bytes_moved,
        floor=1e6 * max(flops / device.peak, bytes_moved / device.dram),
        why_not=""
        if used.ctas
        else f"{used.shared_bytes} bytes of shared memory, {used.registers} registers: "
        f"no CTA fits; {limit} bytes are allowed",
    )


def busiest(ctas: Sequence[tuple[float, ...]], processors: int) -> tuple[float, ...]:
    """Clocks of each kind that the multiprocessor with the most of it needs.

    CTAs go, in their order, to the multiprocessor that has the least to do until then, a CTA taking as long as the
    most that it needs of one kind: a grid whose CTAs differ is not as slow as if each were the average one.
    """
    loads = [(0.0, place) for place in range(min(processors, len(ctas)))]
    sums = [[0.0] * len(ctas[0]) for _ in loads]
    for needs in ctas:
        load, place = loads[0]
        heapq.heapreplace(loads, (load + max(needs), place))
        sums[place] = [total + need for total, need in zip(sums[place], needs, strict=True)]
    return tuple(max(column) for column in zip(*sums, strict=True))


def tensor_cycles(counters: Counters, device: Device) -> float:
    """Clocks that a multiprocessor's tensor cores need."""
    cycles = 0.0
    for kind, flops in counters.tensor_flops.items():
        instruction, _, operands = kind.partition(".")
        rate = device.tensor[instruction] * device.efficiency / (2 if operands == "tf32" else 1)
        cycles += flops / rate
    return cycles
