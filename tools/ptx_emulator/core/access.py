"""How an instruction reaches the shared memory of a batch: its active lanes, and their elements."""

import numpy as np

from ptx_emulator.core.shared import Lanes
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.state import State


def lanes_of(m: State, address: Array, mask: Array | None) -> Lanes:
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


def gather(m: State, lanes: Lanes, unit: int, count: int) -> list[Array]:
    """`count` consecutive elements of `unit` bytes from each lane's address: arrays [CTAs, n] or [n]."""
    index = m.shared.index(lanes, unit)
    flat = m.shared.flat[unit]
    return [flat.take(index if k == 0 else index + k) for k in range(count)]


def place(m: State, lanes: Lanes, value: Array, old: Array) -> Array:
    """The register whose active lanes hold `value` and whose others keep `old`; shape (CTAs, threads)."""
    if lanes.everyone:
        return value.reshape(m.shape)
    out = np.array(np.broadcast_to(old, m.shape), dtype=value.dtype)
    if lanes.cta is None:
        out[:, lanes.thread] = value
    else:
        out[lanes.cta, lanes.thread] = value
    return out


def pick(m: State, lanes: Lanes, value: Array) -> Array:
    """The active lanes' elements of a register, laid out like the indices of `SharedMemory.index`."""
    if lanes.cta is None:
        wide = np.broadcast_to(value, m.shape)
        return wide if lanes.everyone else wide[:, lanes.thread]
    if value.shape == m.shape:
        return value.reshape(-1) if lanes.everyone else value[lanes.cta, lanes.thread]
    return np.broadcast_to(value, m.shape)[lanes.cta, lanes.thread]
