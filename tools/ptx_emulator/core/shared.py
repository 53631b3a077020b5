"""Shared memory of a batch of CTAs, and the lanes that take part in an access to it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx_emulator.core.errors import MemoryFault, Misaligned
from ptx_emulator.core.spaces import RANK_SHIFT, SHARED_BASE, Array


@dataclass
class Lanes:
    """The active lanes of an access.

    common: every CTA accesses the same addresses; then the arrays hold the lanes of one CTA.
    address: byte addresses, int64 [n]. thread: [n]. cta: [n], or None when common. everyone: no lane is masked off.
    """

    common: bool
    address: Array
    thread: Array
    cta: Array | None
    everyone: bool
    agent: Array | None = None  # which warps of the cluster these are, where they access another CTA's memory


class SharedMemory:
    """`size` bytes for each of `ctas` CTAs, filled with NaN patterns; the first SHARED_BASE bytes stay unmapped."""

    def __init__(self, ctas: int, size: int) -> None:
        self.size = size
        self.stride: int = -(-size // 128) * 128
        data = np.full((ctas, self.stride // 2), 0x7FFF, np.uint16).view(np.uint8)
        self.data = data
        self.flat: dict[int, Any] = {1: data.reshape(-1), 2: data.view(np.uint16).reshape(-1)}
        self.flat[4], self.flat[8] = data.view(np.uint32).reshape(-1), data.view(np.uint64).reshape(-1)
        self.bases: dict[int, Array] = {
            n: (np.arange(ctas, dtype=np.int64) * (self.stride // n))[:, None] for n in (1, 2, 4, 8)
        }

    def part(self, ctas: Array) -> "SharedMemory":
        """A copy of some CTAs' memories."""
        other = SharedMemory(len(ctas), self.size)
        other.data[:] = self.data[ctas]
        return other

    def check(self, address: Array, size: int, align: int, text: str) -> None:
        """Raise unless each access lies inside the CTA's allocation and is aligned."""
        if address.size == 0:
            return
        low, high = int(address.min()), int(address.max())
        if low < SHARED_BASE or high + size > self.size:
            bad = int(address[(address < SHARED_BASE) | (address + size > self.size)][0])
            if bad >> RANK_SHIFT:
                raise MemoryFault(
                    f"an address of the CTA of rank {(bad >> RANK_SHIFT) - 1}, made by mapa, where the own CTA's is "
                    f"meant: {text}"
                )
            raise MemoryFault(
                f"shared access of {size} bytes at byte {bad - SHARED_BASE} lies outside the CTA's "
                f"{self.size - SHARED_BASE} bytes: {text}"
            )
        if align > 1 and (address & (align - 1)).any():
            bad = int(address[(address & (align - 1)) != 0][0])
            raise Misaligned(f"shared address, byte {bad - SHARED_BASE}, is no multiple of {align}: {text}")

    def index(self, lanes: Lanes, unit: int) -> Array:
        """Index of each lane's first element into `flat[unit]`: [CTAs, n] when common, else [n]."""
        first = lanes.address // unit if unit == 1 else lanes.address >> (unit.bit_length() - 1)
        if lanes.cta is None:
            return self.bases[unit] + first
        return self.bases[unit][lanes.cta, 0] + first


ROUNDING = 64  #: units in the last place by which two sums of the same float32 numbers may differ


def apart(held: Array, new: Array) -> Array:
    """How far words are from others: 0 equal, 1 normal float32 numbers at most ROUNDING last places apart, 2 otherwise.

    Warps that hold the same data add it in orders of their own (triton-lang/triton#7264).
    """
    far = 2 * (held != new).astype(np.uint8)
    if held.dtype.itemsize == 4 and far.any():
        one, other = held.view(np.uint32).astype(np.int64), np.asarray(new).view(np.uint32).astype(np.int64)
        normal = np.isin((one >> 23) & 255, (0, 255), invert=True) & np.isin((other >> 23) & 255, (0, 255), invert=True)
        near = normal & (one >> 31 == other >> 31) & (np.abs(one - other) <= ROUNDING)
        far = np.where(near & (far > 0), 1, far)
    return far
