"""Shared memory of a batch of CTAs, and the lanes that take part in an access to it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_emulator.core.decode import RANK_SHIFT, SHARED_BASE, Array
from ptx_emulator.core.errors import MemoryFault, Misaligned

if TYPE_CHECKING:
    from ptx_emulator.core.execute import Machine


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
        self.stride = -(-size // 128) * 128
        data = np.full((ctas, self.stride // 2), 0x7FFF, np.uint16).view(np.uint8)
        self.data = data
        self.flat: dict[int, Any] = {1: data.reshape(-1), 2: data.view(np.uint16).reshape(-1)}
        self.flat[4], self.flat[8] = data.view(np.uint32).reshape(-1), data.view(np.uint64).reshape(-1)
        self.bases = {n: (np.arange(ctas, dtype=np.int64) * (self.stride // n))[:, None] for n in (1, 2, 4, 8)}

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


def lanes_of(m: "Machine", address: Array, mask: Array | None) -> Lanes:
    """The active lanes of an access at `address` (CTAs or 1, threads or 1)."""
    height = max(address.shape[0], 1 if mask is None else mask.shape[0])
    common = height == 1
    shape = (1, m.threads) if common else m.shape
    wide = np.broadcast_to(address, shape).reshape(-1).astype(np.int64)
    if mask is None:
        thread = m.every_thread if common else m.every_lane_thread
        return Lanes(common, wide, thread, None if common else m.every_lane_cta, True)
    chosen = np.flatnonzero(np.broadcast_to(mask, shape))
    return Lanes(common, wide[chosen], chosen % m.threads, None if common else chosen // m.threads, False)


def gather(m: "Machine", lanes: Lanes, unit: int, count: int) -> list[Array]:
    """`count` consecutive elements of `unit` bytes from each lane's address: arrays [CTAs, n] or [n]."""
    index = m.shared.index(lanes, unit)
    flat = m.shared.flat[unit]
    return [flat.take(index if k == 0 else index + k) for k in range(count)]


def place(m: "Machine", lanes: Lanes, value: Array, old: Array) -> Array:
    """The register whose active lanes hold `value` and whose others keep `old`; shape (CTAs, threads)."""
    if lanes.everyone:
        return value.reshape(m.shape)
    out = np.array(np.broadcast_to(old, m.shape), dtype=value.dtype)
    if lanes.cta is None:
        out[:, lanes.thread] = value
    else:
        out[lanes.cta, lanes.thread] = value
    return out


def pick(m: "Machine", lanes: Lanes, value: Array) -> Array:
    """The active lanes' elements of a register, laid out like the indices of `SharedMemory.index`."""
    if lanes.cta is None:
        wide = np.broadcast_to(value, m.shape)
        return wide if lanes.everyone else wide[:, lanes.thread]
    if value.shape == m.shape:
        return value.reshape(-1) if lanes.everyone else value[lanes.cta, lanes.thread]
    return np.broadcast_to(value, m.shape)[lanes.cta, lanes.thread]
