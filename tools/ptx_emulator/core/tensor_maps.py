"""Tensor maps, and the bytes that a box of one means in global and in shared memory.

Source: PTX ISA, "Tensors: Tiled Mode, Swizzling Modes, Tensor-map", and the limits that CUDA's driver API sets for
`cuTensorMapEncodeTiled`. The 128 bytes of a real map are the driver's secret; `pack` has a layout of our own.
"""

import struct
from dataclasses import dataclass
from functools import cache

import numpy as np

from ptx_emulator.core.errors import MemoryFault, Misaligned, Unsupported
from ptx_emulator.core.spaces import CONST_WINDOW, HEAP_BASE, PARAM_WINDOW, SHARED_BASE, Array
from ptx_emulator.core.state import Part, State
from ptx_emulator.core.syntax import TYPE_BYTES

MAP_BYTES = 128
MAP_ALIGNMENT = 64
MAGIC = 0x50414D5F454C4954
#: by the numbers that tensormap.replace has for them; 8 is f32 with subnormals flushed, which is not emulated
TYPES = ("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "", "f64", "bf16", "tf32")
SWIZZLES = (0, 32, 64, 128)
FILLS = ("zero", "nan")
_FORMAT = "<Q4B5Q4Q5H5BB"
MOST_DIMENSIONS = 5
#: what tensormap.replace calls a field -> (first byte, bytes of one)
FIELDS = {
    "elemtype": (8, 1),
    "rank": (9, 1),
    "swizzle_mode": (10, 1),
    "fill_mode": (11, 1),
    "global_dim": (12, 8),
    "global_stride": (52, 8),
    "box_dim": (84, 2),
    "element_stride": (94, 1),
    "interleave_layout": (99, 1),
    "global_address": (120, 8),
}


@dataclass(frozen=True)
class TensorMap:
    """A tensor of up to five dimensions in global memory, and the box that one copy moves.

    Raises ValueError for what the driver would refuse.
    """

    address: int  #: of its first element
    type: str  #: of the elements
    sizes: tuple[int, ...]  #: elements along each dimension, innermost first
    strides: tuple[int, ...]  #: bytes from one element to the next along each dimension but the innermost
    box: tuple[int, ...]  #: elements along each dimension
    swizzle: int = 0  #: 0, 32, 64 or 128 bytes
    fill: str = "zero"  #: what is read outside the tensor, "zero" or "nan"

    def __post_init__(self) -> None:
        known = self.type in TYPES and self.type != ""
        rank, row = len(self.sizes), self.box[0] * self.element if known and self.box else 0
        for holds, says in (
            (known, f"type {self.type!r}: one of {', '.join(filter(None, TYPES))}"),
            (1 <= rank <= MOST_DIMENSIONS, f"{rank} dimensions: 1 to {MOST_DIMENSIONS}"),
            (len(self.box) == rank, f"box {self.box}: one number for each of {rank} dimensions"),
            (len(self.strides) == rank - 1, f"strides {self.strides}: one for each dimension but the innermost"),
            (self.address % 16 == 0, f"address {self.address:#x}: a multiple of 16"),
            (all(1 <= n <= 1 << 32 for n in self.sizes), f"sizes {self.sizes}: 1 to 2**32 each"),
            (all(s % 16 == 0 and 0 < s < 1 << 40 for s in self.strides), f"strides {self.strides}: multiples of 16"),
            (all(1 <= n <= 256 for n in self.box), f"box {self.box}: 1 to 256 each"),
            (row % 16 == 0, f"a row of the box has {row} bytes: a multiple of 16"),
            (self.swizzle in SWIZZLES, f"swizzle {self.swizzle}: one of {SWIZZLES}"),
            (not self.swizzle or row <= self.swizzle, f"a row of the box has {row} bytes, its swizzle {self.swizzle}"),
            (self.fill in FILLS, f"fill {self.fill!r}: one of {FILLS}"),
            (self.fill == "zero" or "f" in self.type, f"fill {self.fill!r} of {self.type}: floating types only"),
        ):
            if not holds:
                raise ValueError(f"tensor map: {says}")

    @property
    def element(self) -> int:
        """Bytes of an element."""
        return TYPE_BYTES[self.type]

    @property
    def box_bytes(self) -> int:
        """Bytes of a box in shared memory."""
        return int(np.prod(self.box)) * self.element

    def pack(self) -> bytes:
        """The 128 bytes of a kernel's parameter."""
        codes = (TYPES.index(self.type), len(self.sizes), SWIZZLES.index(self.swizzle), FILLS.index(self.fill))
        pad = [0] * (MOST_DIMENSIONS - len(self.sizes))
        layout = (*self.sizes, *pad, *self.strides, *pad[:4], *self.box, *pad)
        steps = [1] * len(self.sizes) + pad
        packed = struct.pack(_FORMAT, MAGIC, *codes, *layout, *steps, 0)
        # the address stands apart, so that it can be found and replaced
        return (packed.ljust(MAP_BYTES - 8, b"\0")) + struct.pack("<Q", self.address)


@cache
def unpacked(data: bytes) -> TensorMap | None:
    """The map that `pack` or a kernel made these bytes of; None for other bytes, ValueError for a map that is wrong."""
    magic, kind, rank, swizzle, fill, *numbers = struct.unpack_from(_FORMAT, data)
    if magic != MAGIC:
        return None
    (address,) = struct.unpack_from("<Q", data, MAP_BYTES - 8)
    sizes, strides, box = numbers[:rank], numbers[5 : 4 + rank], numbers[9 : 9 + rank]
    if any(step != 1 for step in numbers[14 : 14 + rank]):
        raise ValueError(f"tensor map: element strides {tuple(numbers[14 : 14 + rank])}: 1 each")
    if numbers[19]:
        raise ValueError(f"tensor map: interleaved layout {numbers[19]}: 0")
    return TensorMap(address, TYPES[kind], tuple(sizes), tuple(strides), tuple(box), SWIZZLES[swizzle], FILLS[fill])


class ChangedMaps(Part):
    """Maps in global memory that this batch has changed, and which CTAs have fenced their proxy since."""

    def __init__(self, m: State) -> None:
        self.changed: dict[int, int] = {}  # generic address -> the step of the last change
        self.fenced: dict[tuple[int, int], int] = {}  # (CTA, address) -> the step of its last acquiring fence

    def may_part(self) -> bool:
        """Not where one CTA may use what another has changed."""
        return not self.changed

    def check(self, m: State, cta: int, address: int) -> None:
        """A thread of the CTA uses the map. A fence by any thread of the CTA is taken for its own."""
        step = self.changed.get(address, 0)
        if m.checker is not None and step > self.fenced.get((cta, address), 0):
            m.checker.note("tensor map used without fence.proxy.tensormap", m.trace[-1], m.trace[step], cta)


def tensor_map(m: State, address: int, dimensions: int, text: str, cta: int) -> TensorMap:
    """The map at a generic address, in the parameters, the constants or global memory, for a thread of the CTA."""
    m.of(ChangedMaps).check(m, cta, address)
    if address % MAP_ALIGNMENT:
        raise Misaligned(f"a tensor map at {address:#x}, no multiple of {MAP_ALIGNMENT}: {text}")
    for window, bank in ((PARAM_WINDOW, m.parameters), (CONST_WINDOW, m.constants)):
        if window <= address < window + (1 << 32):
            start, data = address - window, bank
            break
    else:
        start, data = address - HEAP_BASE, m.memory.heap
        m.memory.check(np.array([start]), MAP_BYTES, 1, text)
    if start + MAP_BYTES > len(data):
        raise MemoryFault(f"no tensor map at {address:#x}: {text}")
    try:
        found = unpacked(data[start : start + MAP_BYTES].tobytes())
    except ValueError as error:
        raise MemoryFault(f"{error}; the map at {address:#x}: {text}") from None
    if found is None:
        raise MemoryFault(f"the bytes at {address:#x} are no tensor map; pass a TensorMap for it: {text}")
    if len(found.sizes) != dimensions:
        raise MemoryFault(f"a tensor map of {len(found.sizes)} dimensions: {text}")
    return found


def swizzled(address: Array, width: int) -> Array:
    """Where the swizzle of `width` bytes puts the byte that would be at `address`."""
    return address ^ (((address >> 7) & (width // 16 - 1)) << 4) if width else address


def box_places(tile: TensorMap, corner: tuple[int, ...], to: int, text: str) -> tuple[Array, Array, Array]:
    """(shared byte addresses, whether inside the tensor, heap offsets) of each element of a box, innermost first.

    corner: the box's first element, innermost first; it may lie outside. to: where the box begins in shared memory.
    """
    row = tile.box[0] * tile.element
    atom = 8 * tile.swizzle or 128
    if to % atom:
        raise Misaligned(f"a box at shared byte {to - SHARED_BASE}, no multiple of its swizzle's {atom} bytes: {text}")
    if tile.swizzle and row != tile.swizzle and len(tile.box) > 1:
        raise Unsupported(f"unsupported: rows of {row} bytes under a swizzle of {tile.swizzle}: {text}")
    shared = swizzled(to + tile.element * np.arange(int(np.prod(tile.box))), tile.swizzle)
    heap, inside = np.zeros(1, np.int64), np.ones(1, bool)
    strides = (tile.element, *tile.strides)
    for first, count, size, stride in zip(corner, tile.box, tile.sizes, strides, strict=True):
        place = first + np.arange(count)
        heap = (heap[None, :] + stride * place[:, None]).reshape(-1)
        inside = (inside[None, :] & ((place >= 0) & (place < size))[:, None]).reshape(-1)
    return shared, inside, heap + (tile.address - HEAP_BASE)
