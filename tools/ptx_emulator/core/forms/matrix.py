"""ldmatrix and stmatrix: 8x8 matrices of 16-bit elements between shared memory and the registers of a warp.

Source: PTX ISA, "Warp-level matrix instructions: ldmatrix, stmatrix". Matrix j takes its row addresses from lanes 8j to
8j+7, 16 bytes a row; lane l holds row l/4, columns 2(l%4) and 2(l%4)+1, or with `.trans` the same places of the
transposed matrix.
"""

import numpy as np

from ptx_emulator.core.access import lanes_of
from ptx_emulator.core.decode import Action, Decoder, Modifiers, instruction, items
from ptx_emulator.core.errors import Divergence, Unsupported
from ptx_emulator.core.forms.loads import count_shared, effective
from ptx_emulator.core.shared import Lanes
from ptx_emulator.core.spaces import SHARED_BASE, Array
from ptx_emulator.core.state import State
from ptx_emulator.core.syntax import Instruction, Operand

LANE = np.arange(32)
ROW, PLACE = LANE // 4, LANE % 4
ROW_BYTES = 16


def whole_warps(m: State, mask: Array | None, text: str) -> None:
    """Raise Divergence when a warp has both active and inactive lanes."""
    if mask is not None:
        rows = np.broadcast_to(mask, (mask.shape[0], m.threads)).reshape(-1, 32)
        if (rows.any(1) != rows.all(1)).any():
            raise Divergence(f"reached by some lanes of a warp only: {text}")


def _prepare(
    m: State, base: int, offset: int, mask: Array | None, count: int, way: str, text: str
) -> tuple[Lanes, Array]:
    """(lanes that give row addresses, all row addresses as [rows, 32]); a row is a warp, of one CTA when common."""
    whole_warps(m, mask, text)
    address = effective(m, base, offset)
    givers = (np.arange(m.threads) % 32 < 8 * count)[None, :]
    if mask is not None:
        givers = givers & mask
    lanes = lanes_of(m, address, None if count == 4 and mask is None else givers)
    m.shared.check(lanes.address, ROW_BYTES, ROW_BYTES, text)
    count_shared(m, way, address, None if count == 4 and mask is None else givers, ROW_BYTES)
    height = 1 if lanes.cta is None else m.ctas
    wide = np.broadcast_to(address, (height, m.threads))
    if mask is not None:
        wide = np.where(np.broadcast_to(mask, (height, m.threads)), wide, SHARED_BASE)
    return lanes, wide.reshape(-1, 32)


def _flat(m: State, place: Array, unit: int) -> Array:
    """Indices into `flat[unit]`, [CTAs, threads], of element numbers [rows, 32]."""
    return m.shared.bases[unit] + place.reshape(-1, m.threads)


def _matrices(
    d: Decoder, ins: Instruction, registers: Operand, address: Operand
) -> tuple[tuple[Operand, ...], bool, tuple[int, int]]:
    """(a register for each matrix, whether they are transposed, register and offset of the rows' addresses)."""
    vector = items(registers)
    mods = Modifiers(ins)
    mods.drop("sync", "aligned", "m8n8", "shared", "shared::cta")
    number = mods.take("x1", "x2", "x4")
    transposed = mods.take("trans") is not None
    if mods.types() != ["b16"] or number is None or len(vector) != int(number[1:]) or "m8n8" not in ins.modifiers:
        raise Unsupported(f"unsupported: {ins.text}")
    mods.end()
    return vector, transposed, d.address(address, ins)[:2]


@instruction("ldmatrix")
def build_load_matrix(d: Decoder, ins: Instruction) -> Action | None:
    targets, transposed, (base, offset) = _matrices(d, ins, *ins.operands[:2])
    outs = [d.destination(o, "b32", ins) for o in targets]
    number, text = d.current, ins.text

    def load(m: State, mask: Array | None) -> None:
        lanes, rows = _prepare(m, base, offset, mask, len(outs), "load", text)
        m.tick(number)
        if m.checker is not None:
            m.checker.read(lanes, ROW_BYTES)
        for j, out in enumerate(outs):
            if transposed:
                flat = m.shared.flat[2]
                low = flat.take(_flat(m, (rows.take(8 * j + 2 * PLACE, axis=1) >> 1) + ROW, 2))
                high = flat.take(_flat(m, (rows.take(8 * j + 2 * PLACE + 1, axis=1) >> 1) + ROW, 2))
                value = low | high.astype(np.uint32) << np.uint32(16)
            else:
                value = m.shared.flat[4].take(_flat(m, (rows.take(8 * j + ROW, axis=1) >> 2) + PLACE, 4))
            m.r[out] = value if mask is None else np.where(mask, value, m.r[out])

    return load


@instruction("stmatrix")
def build_store_matrix(d: Decoder, ins: Instruction) -> Action | None:
    sources, transposed, (base, offset) = _matrices(d, ins, *ins.operands[1::-1])
    numbers = [d.source(o, "b32", ins) for o in sources]
    number, text = d.current, ins.text

    def store(m: State, mask: Array | None) -> None:
        lanes, rows = _prepare(m, base, offset, mask, len(numbers), "store", text)
        active = None if mask is None else np.broadcast_to(mask, m.shape)
        writes = []
        for j, source in enumerate(numbers):
            value = np.broadcast_to(m.r[source], m.shape)
            if transposed:
                for half, part in enumerate((value & np.uint32(0xFFFF), value >> np.uint32(16))):
                    index = _flat(m, (rows.take(8 * j + 2 * PLACE + half, axis=1) >> 1) + ROW, 2)
                    writes.append((2, np.broadcast_to(index, m.shape), part.astype(np.uint16)))
            else:
                index = _flat(m, (rows.take(8 * j + ROW, axis=1) >> 2) + PLACE, 4)
                writes.append((4, np.broadcast_to(index, m.shape), value))

        def differs() -> Array:
            changed = np.zeros((m.ctas, m.warps, 4, 8), np.uint8)
            for k, (unit, index, value) in enumerate(writes):
                new = 2 * (m.shared.flat[unit][index] != value).reshape(m.ctas, m.warps, 8, 4).astype(np.uint8)
                if transposed:  # lane l changes row 2(l%4) + half
                    changed[:, :, k // 2, k % 2 :: 2] |= new.max(2)
                else:
                    changed[:, :, k] |= new.max(3)
            per_lane = changed.reshape(m.ctas, m.threads)
            return per_lane[:, lanes.thread] if lanes.cta is None else per_lane[lanes.cta, lanes.thread]

        m.tick(number)
        tags = None if m.checker is None else m.checker.write(lanes, ROW_BYTES, differs)
        for unit, index, value in writes:
            flat = m.shared.flat[unit]
            if active is None:
                flat[index] = value
            else:
                flat[index[active]] = value[active]
        if m.checker is not None and tags is not None:
            m.checker.wrote(tags, lanes, differs)

    return store
