"""Tensor maps that a kernel makes itself: tensormap.replace, tensormap.cp_fenceproxy.

Source: PTX ISA, "Tensor Map Manipulation: tensormap.replace", "Parallel Synchronization: tensormap.cp_fenceproxy". The
fields lie where `TensorMap.pack` puts them.
"""

import numpy as np

from ptx_emulator.core.clocks import ClusterChecker
from ptx_emulator.core.decode import Action, Decoder, Modifiers, instruction
from ptx_emulator.core.errors import EmulationError, Unsupported
from ptx_emulator.core.forms.loads import effective
from ptx_emulator.core.forms.matrix import whole_warps
from ptx_emulator.core.forms.mbarriers import active
from ptx_emulator.core.shared import Lanes
from ptx_emulator.core.spaces import HEAP_BASE, Array
from ptx_emulator.core.state import State
from ptx_emulator.core.syntax import Instruction, Literal
from ptx_emulator.core.tensor_maps import FIELDS, MAGIC, MAP_BYTES, MOST_DIMENSIONS, ChangedMaps

#: field -> what it must be, where that is only one value here: other layouts and steps are not emulated
ONLY = {"interleave_layout": 0, "element_stride": 1}
#: values of a field beyond those emulated, by their numbers in the document
MOST = {"elemtype": 11, "swizzle_mode": 3, "fill_mode": 1, "rank": MOST_DIMENSIONS - 1}


@instruction("tensormap")
def build_tensor_map(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    what = mods.take("replace", "cp_fenceproxy")
    if what == "cp_fenceproxy":
        return _publish(d, ins, mods)
    mods.drop("tile", "b1024")
    field = mods.take(*FIELDS)
    space = mods.take("shared::cta", "global")
    types = mods.types()
    mods.end()
    ordinal = ins.operands[1] if len(ins.operands) == 3 else Literal("0")
    if what != "replace" or field is None or types not in (["b32"], ["b64"]) or not isinstance(ordinal, Literal):
        raise Unsupported(f"unsupported: {ins.text}")
    place, size = FIELDS[field]
    place += size * int(ordinal.text, 0)
    base, offset, _ = d.address(ins.operands[0], ins)
    value = d.source(ins.operands[-1], types[0], ins)
    number, text = d.current, ins.text

    def replace(m: State, mask: Array | None) -> None:
        m.tick(number)
        addresses, values = m.full(effective(m, base, offset)), m.full(m.r[value])
        for cta, thread in active(m, mask):
            new, address = int(values[cta, thread]), int(addresses[cta, thread])
            if new != ONLY.get(field, new) or new > MOST.get(field, new):
                raise Unsupported(f"unsupported: {field} {new} in {text}")
            target = _bytes(m, cta, thread, address, space == "global", text)
            if space == "global":
                m.of(ChangedMaps).changed[address] = m.step
            target[:8] = np.frombuffer(MAGIC.to_bytes(8, "little"), np.uint8)
            stored = new + 1 if field == "rank" else new
            target[place : place + size] = np.frombuffer(stored.to_bytes(8, "little")[:size], np.uint8)

    return replace


def _bytes(m: State, cta: int, thread: int, address: int, in_global: bool, text: str) -> Array:
    """The 128 bytes of a map that a thread changes."""
    if in_global:
        m.memory.check(np.array([address - HEAP_BASE]), MAP_BYTES, MAP_BYTES // 2, text)
        return m.memory.heap[address - HEAP_BASE :][:MAP_BYTES]
    m.shared.check(np.array([address]), MAP_BYTES, MAP_BYTES, text)
    if m.checker is not None:
        if isinstance(m.checker, ClusterChecker):
            cells = m.checker.cells(cta, address + np.arange(0, MAP_BYTES, 16), 16)
            m.checker.lane_changes(cta, cells, m.agent(cta, thread))
        m.checker.write(_lane(cta, thread, address), MAP_BYTES, lambda: np.full(1, 2, np.uint8))
    start = int(m.shared.bases[1][cta, 0]) + address
    return m.shared.flat[1][start : start + MAP_BYTES]


def _lane(cta: int, thread: int, address: int) -> Lanes:
    return Lanes(False, np.array([address]), np.array([thread]), np.array([cta]), False)


def _publish(d: Decoder, ins: Instruction, mods: Modifiers) -> Action:
    """A warp copies a map from shared to global memory, with a fence for those that will use it there."""
    mods.drop(
        "global", "shared::cta", "tensormap::generic", "release", "cta", "cluster", "gpu", "sys", "sync", "aligned"
    )
    mods.end()
    size = ins.operands[2]
    if not isinstance(size, Literal) or int(size.text, 0) != MAP_BYTES:
        raise Unsupported(f"unsupported: {ins.text}")
    to, source = d.address(ins.operands[0], ins)[:2], d.address(ins.operands[1], ins)[:2]
    number, text = d.current, ins.text

    def copy(m: State, mask: Array | None) -> None:
        whole_warps(m, mask, text)
        m.tick(number)
        target, start = m.full(effective(m, *to)), m.full(effective(m, *source))
        for cta, thread in active(m, mask):
            if thread % 32:
                continue
            warp = (cta, slice(thread, thread + 32))
            if len({*target[warp].tolist()}) > 1 or len({*start[warp].tolist()}) > 1:
                raise EmulationError(f"the lanes of a warp name different maps: {text}")
            address, place = int(start[cta, thread]), int(target[cta, thread]) - HEAP_BASE
            m.shared.check(np.array([address]), MAP_BYTES, MAP_BYTES, text)
            m.memory.check(np.array([place]), MAP_BYTES, MAP_BYTES, text)
            if m.checker is not None:
                m.checker.read(_lane(cta, thread, address), MAP_BYTES)
            first = int(m.shared.bases[1][cta, 0]) + address
            m.of(ChangedMaps).changed[place + HEAP_BASE] = m.step
            m.memory.heap[place : place + MAP_BYTES] = m.shared.flat[1][first : first + MAP_BYTES]

    return copy
