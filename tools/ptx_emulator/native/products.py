"""wgmma by compiled code: what `core.forms.wgmma` does for `mma_async`, with one pass over the operands."""

import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from typing import Any

import numpy as np

from ptx_emulator.core.descriptors import Layout, find_operand
from ptx_emulator.core.forms.wgmma import (
    ROWS,
    MmaAsync,
    active_groups,
    check_fence,
    check_overlap,
    current,
    launched,
    per_group,
    products,
)
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.state import Part, State
from ptx_emulator.native.library import Batch, library

KINDS = {"bf16": 0, "f16": 1, "tf32": 2}
Chunks = tuple[Array, Array]  # of each descriptor, [descriptors, chunks]; the descriptor of each warpgroup


class Compiled(Part):
    """What the compiled machine knows of a batch."""

    batch: Batch


class Product(ctypes.Structure):
    """`Product` in csrc/ptx/products.h."""

    _fields_ = [
        *((name, c_int64) for name in ("groups", "columns", "depth", "kind", "negative")),
        *((name, c_void_p) for name in ("a_chunks", "a_row", "a_registers")),
        *((name, c_int64) for name in ("a_count", "a_major")),
        *((name, c_void_p) for name in ("b_chunks", "b_row")),
        *((name, c_int64) for name in ("b_count", "b_major")),
        *((name, c_void_p) for name in ("active", "keep", "old", "out")),
    ]


def native_product(mma: MmaAsync, number: Callable[[int], int]) -> Callable[[State, Array | None], None]:
    """The action of a `wgmma.mma_async`. number: the machine's operand of a register."""
    inputs = frozenset(mma.a_registers)
    a_operands = np.array([number(r) for r in mma.a_registers], np.int32)

    def multiply(m: State, mask: Array | None) -> None:
        active = active_groups(m, mask, mma.text)
        state = products(m, mma.text)
        m.tick(mma.number)
        regions: list[Any] = []
        call = Product(groups=active.shape[1], columns=mma.b_layout.rows, depth=mma.b_layout.depth)
        call.kind, call.negative = KINDS[mma.kind], mma.sign < 0
        if inputs:
            call.a_registers = a_operands.ctypes.data
        else:
            a_chunks, a_row = _operand(m, mma.a, mma.a_layout, active, regions, mma.text)
            call.a_chunks, call.a_row = a_chunks.ctypes.data, a_row.ctypes.data
            call.a_count, call.a_major = a_chunks.shape[1], mma.a_layout.mn_major
        b_chunks, b_row = _operand(m, mma.b, mma.b_layout, active, regions, mma.text)
        call.b_chunks, call.b_row = b_chunks.ctypes.data, b_row.ctypes.data
        call.b_count, call.b_major = b_chunks.shape[1], mma.b_layout.mn_major
        check_fence(m, state, mma.registers, mma.a_registers, active)
        check_overlap(state, mma.registers, mma.text)
        kept = per_group(m, m.r[mma.scale], mma.negated, active, mma.text)
        keep = np.ascontiguousarray(np.broadcast_to(kept.reshape(-1), active.size))
        everyone = np.ascontiguousarray(active)
        call.keep, call.active = keep.ctypes.data, everyone.ctypes.data
        old = current(m, state, mma.registers) if keep.any() or not active.all() else None
        out = state.matrices.get(mma.registers)
        if old is None or out is not old:  # what registers hold as well is not written over
            out = np.empty((active.size, ROWS, mma.b_layout.rows), np.float32)
        if old is not None:
            old = np.ascontiguousarray(old)
            call.old = old.ctypes.data
        call.out = out.ctypes.data
        library().product(m.of(Compiled).batch, ctypes.byref(call))
        state.matrices[mma.registers] = out
        launched(m, state, mma, active, regions)

    return multiply


def _operand(m: State, register: int, layout: Layout, active: Array, regions: list[Any], text: str) -> Chunks:
    """An operand in shared memory; tells the checker that it is read."""
    operand = find_operand(m, m.r[register], layout, active, text)
    rows = np.zeros(operand.values.shape, np.int32)
    everyone = bool(active.all())
    for place, (descriptor, chunks) in enumerate(operand.found):
        where = (operand.values == np.uint64(descriptor)) & active
        rows[where] = place
        if m.checker is not None:
            m.checker.operand_read(chunks.reshape(-1), where, operand.common and everyone, regions)
    flat = [chunks.reshape(-1) for _, chunks in operand.found]
    return np.array(flat, np.int32).reshape(len(flat), -1), rows
