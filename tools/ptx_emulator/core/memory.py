"""Emulated global memory: registered buffers with unmapped gaps between them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ptx_emulator.core.errors import MemoryFault, Misaligned
from ptx_emulator.core.spaces import HEAP_BASE, Array

ALIGNMENT = 256
GUARD = 4096  # unmapped bytes after each buffer, at least


@dataclass
class Buffer:
    """One registered buffer at heap offset `start`."""

    name: str
    start: int
    size: int
    array: Array


class Memory:
    """Global memory of the emulated device.

    `register` copies a buffer in and gives it an address; launches work on the copy;
    `write_back` copies all buffers out.
    """

    def __init__(self, sizes: Iterable[int] = ()) -> None:
        """sizes: bytes of the buffers to come, for which memory is taken at once; more is taken where it is needed."""
        room = sum(size + GUARD + 2 * ALIGNMENT for size in sizes)
        self.buffers: list[Buffer] = []
        self._end = ALIGNMENT
        self._starts = np.zeros(0, np.int64)
        self._stops = np.zeros(0, np.int64)
        self._resize(max(room, ALIGNMENT))

    def _resize(self, size: int) -> None:
        heap = np.full(-(-size // ALIGNMENT) * ALIGNMENT, 0xFF, np.uint8)
        if self.buffers:
            heap[: len(self.heap)] = self.heap
        self.heap: Array = heap
        self.views: dict[int, Array] = {
            1: heap,
            2: heap.view(np.uint16),
            4: heap.view(np.uint32),
            8: heap.view(np.uint64),
        }

    def register(self, array: Array, name: str = "", offset: int = 0) -> int:
        """Map a buffer and return its address, `offset` bytes above a multiple of 256.

        Args:
            array: the buffer's bytes, 1-D uint8, contiguous; of any length, zero included. Its content is copied in.
            name: what faults call the buffer.
            offset: how far behind such a multiple it begins, for a view into a larger block.

        Raises TypeError or ValueError when `array` is something else.
        """
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
            raise TypeError(
                f"register takes a NumPy uint8 array, not {getattr(array, 'dtype', type(array).__name__)}: "
                "pass x.view(np.uint8)"
            )
        if array.ndim != 1 or (array.size and not array.flags.c_contiguous):
            raise ValueError(f"register takes a contiguous 1-D array, not shape {array.shape}: pass x.reshape(-1)")
        if not 0 <= offset < ALIGNMENT:
            raise ValueError(f"offset={offset}: 0 to {ALIGNMENT - 1}")
        start = self._end + offset
        self._end = -(-(start + array.size + GUARD) // ALIGNMENT) * ALIGNMENT
        if self._end > len(self.heap):
            self._resize(max(self._end, 2 * len(self.heap) if len(self.heap) < 1 << 28 else self._end))
        self.heap[start : start + array.size] = array
        self.buffers.append(Buffer(name or f"buffer {len(self.buffers)}", start, array.size, array))
        self._starts = np.array([b.start for b in self.buffers])
        self._stops = np.array([b.start + b.size for b in self.buffers])
        return HEAP_BASE + start

    def write_back(self) -> None:
        """Copy every writable buffer's content out to the array it was registered with."""
        for buffer in self.buffers:
            if buffer.array.flags.writeable:
                buffer.array[:] = self.heap[buffer.start : buffer.start + buffer.size]

    def check(self, offsets: Array, size: int, align: int, text: str) -> None:
        """Raise unless each heap offset begins `size` bytes inside one buffer and is a multiple of `align`."""
        if offsets.size == 0:
            return
        low, high = int(offsets.min()), int(offsets.max())
        found = int(np.searchsorted(self._starts, low, "right")) - 1
        if found < 0 or high + size > int(self._stops[found]):
            index = np.searchsorted(self._starts, offsets, "right") - 1
            stops = self._stops[np.maximum(index, 0)] if len(self._stops) else np.zeros_like(offsets)
            bad = (index < 0) | (offsets + size > stops)
            if bad.any():
                raise MemoryFault(self._describe(int(offsets[bad].flat[0]), size, text))
        if align > 1 and (offsets & (align - 1)).any():
            first = int(offsets[(offsets & (align - 1)) != 0].flat[0])
            raise Misaligned(f"global address {HEAP_BASE + first:#x} is no multiple of {align}: {text}")

    def _describe(self, offset: int, size: int, text: str) -> str:
        address = (HEAP_BASE + offset) & (2**64 - 1)
        nearest = min(
            self.buffers,
            key=lambda b: max(b.start - offset, offset - b.start - b.size, 0),
            default=Buffer("", 0, 0, self.heap),
        )
        return (
            f"global access of {size} bytes at {address:#x} lies outside every buffer "
            f"(byte {offset - nearest.start} of {nearest.name!r}, which has {nearest.size}): {text}"
        )
