"""Operands of wgmma in shared memory: the 64-bit matrix descriptor and the layouts it describes.

Source: PTX ISA, "Asynchronous warpgroup level matrix shared memory layout" (descriptor, strides, swizzling modes). Bits
0-13 start address >> 4, 16-29 leading byte offset >> 4, 32-45 stride byte offset >> 4, 49-51 base offset, 62-63
swizzling.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ptx_emulator.core.errors import Divergence, MemoryFault, Unsupported
from ptx_emulator.core.formats import bf16_to_f32, f16_to_f32
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.state import State

CHUNK = 16  # bytes; swizzling moves chunks, never what is inside one
SWIZZLE_BYTES = {0: 0, 1: 128, 2: 64, 3: 32}


@dataclass(frozen=True)
class Layout:
    """An operand of `rows` (M or N) by `depth` (K) elements of `size` bytes;
    mn_major: consecutive rows are adjacent."""

    rows: int
    depth: int
    size: int
    mn_major: bool


@cache
def chunk_addresses(descriptor: int, layout: Layout) -> Array:
    """Shared-memory byte address of every 16-byte chunk: [rows, chunks of K], or MN-major [K, chunks of rows]."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width = SWIZZLE_BYTES[descriptor >> 62]
    each = CHUNK // layout.size
    if layout.mn_major:
        k = np.arange(layout.depth)[:, None]
        row = each * np.arange(layout.rows // each)[None, :]
        if width:
            tile = width // layout.size
            address = row // tile * leading + k // 8 * stride + k % 8 * width + layout.size * (row % tile)
        else:
            address = row // each * stride + k // 8 * leading + k % 8 * CHUNK
    else:
        row = np.arange(layout.rows)[:, None]
        k = each * np.arange(layout.depth // each)[None, :]
        address = row // 8 * stride + (layout.size * k if width else k // each * leading) + row % 8 * (width or CHUNK)
    address = address + start
    return address ^ (((address >> 7) & (width // CHUNK - 1 if width else 0)) << 4)


def _of_groups(m: State, register: Array, active: Array, text: str) -> tuple[Array, bool]:
    """(descriptor of each warpgroup, [CTAs, warpgroups]; whether all CTAs agree)."""
    groups = m.threads // 128
    if register.shape[1] == 1:
        values = np.repeat(register, groups, axis=1)
    else:
        lanes = register.reshape(-1, groups, 128)
        if ((lanes != lanes[:, :, :1]).any(2) & active).any():
            raise Divergence(f"a descriptor differs within a warpgroup: {text}")
        values = lanes[:, :, 0]
    return np.broadcast_to(values, (m.ctas, groups)), register.shape[0] == 1


@dataclass(frozen=True)
class Operand:
    """The descriptors of an operand: of each warpgroup, [CTAs, warpgroups]; whether all CTAs agree; and those of active
    warpgroups, each with the addresses of its chunks."""

    values: Array
    common: bool
    found: tuple[tuple[int, Array], ...]


def find_operand(m: State, register: Array, layout: Layout, active: Array, text: str) -> Operand:
    """The descriptors in a register, checked. Raises MemoryFault, Unsupported or Divergence."""
    values, common = _of_groups(m, register, active, text)
    found = []
    for one in np.unique(values if active.all() else values[active]):
        descriptor = int(one)
        if descriptor >> 49 & 7:
            raise Unsupported(f"unsupported: a descriptor with base offset {descriptor >> 49 & 7} in {text}")
        chunks = chunk_addresses(descriptor, layout)
        if int(chunks.min()) < 1024 or int(chunks.max()) + CHUNK > m.shared.size:
            raise MemoryFault(
                f"a matrix descriptor reaches byte {int(chunks.max()) + CHUNK - 1024} of the CTA's "
                f"{m.shared.size - 1024}: {text}"
            )
        found.append((descriptor, chunks))
    return Operand(values, common, tuple(found))


def read_operand(
    m: State, register: Array, layout: Layout, kind: str, active: Array, regions: list[Any], text: str
) -> Array:
    """The operand of every warpgroup as float32 [warpgroups, rows, K]; inactive ones hold zeros.

    Tells the checker what is read, and adds to `regions` what stays pinned until the product is waited for.
    """
    operand = find_operand(m, register, layout, active, text)
    values, found = operand.values, operand.found
    out: Array | None = None
    everyone = bool(active.all())
    for one, chunks in found:
        where = (values == np.uint64(one)) & active
        if m.checker is not None:
            m.checker.operand_read(chunks.reshape(-1), where, operand.common and everyone, regions)
        ctas = np.flatnonzero(where.any(1))
        tile = _decode(m, chunks, ctas, layout, kind)
        if out is None and len(found) == 1 and everyone:
            return np.repeat(tile, where.shape[1], axis=0)
        if out is None:
            out = np.zeros((*where.shape, layout.rows, layout.depth), np.float32)
        position = np.zeros(m.ctas, np.int64)
        position[ctas] = np.arange(len(ctas))
        cta, group = np.nonzero(where)
        out[cta, group] = tile[position[cta]]
    if out is None:
        return np.zeros((values.size, layout.rows, layout.depth), np.float32)
    return out.reshape(-1, layout.rows, layout.depth)


def _decode(m: State, chunks: Array, ctas: Array, layout: Layout, kind: str) -> Array:
    """Chunks of the given CTAs as float32 [CTAs, rows, K]."""
    quads = m.shared.data.reshape(m.ctas, -1).view(np.complex128)
    source = quads if len(ctas) == m.ctas else quads[ctas]
    raw = source.take(chunks.reshape(-1) >> 4, axis=1).reshape(len(ctas), *chunks.shape)
    if layout.size == 4:
        return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    bits = raw.view(np.uint16)
    values = bf16_to_f32(bits) if kind == "bf16" else f16_to_f32(bits)
    return values.transpose(0, 2, 1) if layout.mn_major else values
