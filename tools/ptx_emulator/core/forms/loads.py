"""ld and st in every state space. Source: PTX ISA, "Data Movement and Conversion Instructions: ld, st"."""

from collections.abc import Callable

import numpy as np

from ptx_emulator.core.access import gather, lanes_of, pick, place
from ptx_emulator.core.decode import Action, Decoder, Modifiers, instruction, items
from ptx_emulator.core.errors import MemoryFault, Misaligned, Unsupported
from ptx_emulator.core.forms.clusters import put, remote_lanes
from ptx_emulator.core.shared import Lanes, apart
from ptx_emulator.core.spaces import HEAP_BASE, SIGNED, UNSIGNED, WINDOWS, Array
from ptx_emulator.core.state import State
from ptx_emulator.core.syntax import TYPE_BYTES, Instruction

ORDERING = (
    "weak",
    "volatile",
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "cta",
    "cluster",
    "gpu",
    "sys",
    "mmio",
    "noftz",
)
CACHING = (
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "unified"),
    *(f"L1::{how}" for how in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")),
    *(f"L2::{how}" for how in ("evict_normal", "evict_first", "evict_last", "cache_hint", "64B", "128B", "256B")),
)
SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const")
Space = Callable[[State, Array, Array | None], str]


def space_of(mods: Modifiers) -> str:
    """The state space, "generic" when none is named."""
    space = mods.take(*SPACES) or "generic"
    return "shared" if space == "shared::cta" else space


def effective(m: State, base: int, offset: int) -> Array:
    """Byte addresses as int64, (CTAs or 1, threads or 1)."""
    value = m.r[base]
    address = value.view(np.int64) if value.dtype.itemsize == 8 else value.astype(np.int64)
    return address + offset if offset else address


def resolve(m: State, space: str, address: Array, mask: Array | None) -> tuple[str, Array]:
    """The state space a generic address points into, by its first active lane, and the address in that space."""
    if space != "generic":
        return space, address
    if mask is None:
        first = int(address.flat[0])
    else:
        first = int(np.broadcast_to(address, m.shape)[np.broadcast_to(mask, m.shape)][0])
    for name, window in WINDOWS.items():
        if window <= first < window + (1 << 32):
            address = address - window
            if name == "shared" and m.cluster > 1:
                return "shared::cluster", address
            return name, address
    return "global", address


def _extend(value: Array, kind: str, size: int) -> Array:
    """An element of type `kind` in a register of `size` bytes."""
    have = value.dtype.itemsize
    if have == size:
        return value
    if kind[0] == "s":
        return value.view(SIGNED[have]).astype(SIGNED[size]).view(UNSIGNED[size])
    return value.astype(UNSIGNED[size])


def global_lanes(
    m: State, address: Array, mask: Array | None, size: int, align: int, text: str
) -> tuple[Array, Array | None]:
    """(heap offsets, flat numbers of the active lanes or None for all), checked. Without a mask the offsets keep the
    address's shape; with one they are [n]."""
    offsets = address - HEAP_BASE
    chosen = None
    if mask is not None:
        chosen = np.flatnonzero(np.broadcast_to(mask, m.shape))
        offsets = (
            offsets.reshape(-1).take(chosen)
            if offsets.shape == m.shape
            else np.broadcast_to(offsets, m.shape).reshape(-1).take(chosen)
        )
    m.memory.check(offsets, size, align, text)
    return offsets, chosen


def global_read(m: State, offsets: Array, unit: int, count: int) -> list[Array]:
    """`count` consecutive elements of `unit` bytes from each heap offset."""
    index = offsets >> (unit.bit_length() - 1)
    view = m.memory.views[unit]
    return [view.take(index if k == 0 else index + k) for k in range(count)]


@instruction("ld")
def build_load(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    space = space_of(mods)
    vector = mods.take("v2", "v4", "v8")
    mods.drop(*ORDERING, *CACHING)
    types = mods.types()
    mods.end()
    if len(types) != 1:
        raise Unsupported(f"unsupported: {ins.text}")
    kind = types[0]
    unit, targets = TYPE_BYTES[kind], items(ins.operands[0])
    if len(targets) != int(vector[1:] if vector else 1):
        raise Unsupported(f"unsupported: {ins.text}")
    outs = [d.destination(o, kind, ins, loose=True) for o in targets]
    widths = [d.widths[o] if o < len(d.widths) else unit for o in outs]
    base, offset, _ = d.address(ins.operands[1], ins)
    number, size, text = d.current, unit * len(outs), ins.text

    def load(m: State, mask: Array | None) -> None:
        where, address = resolve(m, space, effective(m, base, offset), mask)
        if where == "global":
            offsets, chosen = global_lanes(m, address, mask, size, size, text)
            m.counters.add_global("load", address - HEAP_BASE, mask, size, m.shape)
            for out, width, value in zip(outs, widths, global_read(m, offsets, unit, len(outs)), strict=True):
                value = _extend(value, kind, width)
                if chosen is not None:
                    whole = np.array(np.broadcast_to(m.r[out], m.shape))
                    whole.reshape(-1)[chosen] = value
                    value = whole
                m.r[out] = value
        elif where == "shared":
            lanes = shared_lanes(m, address, mask, size, text)
            m.tick(number)
            if m.checker is not None:
                m.checker.read(lanes, size)
            count_shared(m, "load", address, mask, size)
            for out, width, value in zip(outs, widths, gather(m, lanes, unit, len(outs)), strict=True):
                m.r[out] = place(m, lanes, _extend(value, kind, width), m.r[out])
        elif where == "shared::cluster":
            m.tick(number)
            lanes, flat = remote_lanes(m, address, mask, size, text)
            if m.checker is not None:
                m.checker.read(lanes, size)
            for out, width, value in zip(outs, widths, gather(m, lanes, unit, len(outs)), strict=True):
                put(m, out, flat, _extend(value, kind, width))
        else:
            for k, (out, width) in enumerate(zip(outs, widths, strict=True)):
                read = local_read if where == "local" else bank_read
                value = _extend(read(m, where, address + k * unit, mask, unit, text), kind, width)
                m.r[out] = value if mask is None else np.where(mask, value, m.r[out])

    return load


def bank_read(m: State, space: str, address: Array, mask: Array | None, unit: int, text: str) -> Array:
    """One element of `unit` bytes from the parameters or the constants, which all threads share."""
    bank, name = (m.parameters, "parameters") if space == "param" else (m.constants, "constants")
    active = address if mask is None else np.broadcast_to(address, m.shape)[np.broadcast_to(mask, m.shape)]
    if active.size and (active.min() < 0 or active.max() + unit > len(bank)):
        raise MemoryFault(f"bytes {active.min()} to {active.max()} lie outside the {name}: {text}")
    if (active % unit).any():
        raise Misaligned(f"byte {active[active % unit != 0][0]} of the {name} is no multiple of {unit}: {text}")
    inside = np.clip(address, 0, max(len(bank) - unit, 0))
    return bank[inside[..., None] + np.arange(unit)].view(UNSIGNED[unit])[..., 0]


def shared_lanes(m: State, address: Array, mask: Array | None, size: int, text: str) -> Lanes:
    """The active lanes of a shared access, checked for bounds and alignment."""
    lanes = lanes_of(m, address, mask)
    m.shared.check(lanes.address, size, size, text)
    return lanes


def count_shared(m: State, way: str, address: Array, mask: Array | None, size: int) -> None:
    """Count a shared access; one CTA's worth when all CTAs use the same addresses."""
    height = max(address.shape[0], 1 if mask is None else mask.shape[0])
    shape = (height, m.threads)
    wide = np.broadcast_to(address, shape)
    m.counters.add_shared(way, wide, None if mask is None else np.broadcast_to(mask, shape), size, m.ctas // height)


def _local_index(m: State, address: Array, mask: Array | None, unit: int, text: str) -> Array:
    wide = np.broadcast_to(address, m.shape)
    bad = (wide < 0) | (wide + unit > m.kernel.local_bytes)
    if mask is not None:
        bad &= mask
    if bad.any() or m.local is None:
        raise MemoryFault(f"local access outside the thread's {m.kernel.local_bytes} bytes: {text}")
    return np.clip(wide, 0, m.kernel.local_bytes - unit)


def local_read(m: State, space: str, address: Array, mask: Array | None, unit: int, text: str) -> Array:
    """One element of `unit` bytes from each thread's local memory."""
    index = _local_index(m, address, mask, unit, text)
    assert m.local is not None
    data = np.take_along_axis(m.local, index[..., None] + np.arange(unit), axis=2)
    return np.ascontiguousarray(data).view(UNSIGNED[unit])[..., 0]


def local_write(m: State, address: Array, mask: Array | None, value: Array, text: str) -> None:
    """Write one element to each active thread's local memory."""
    unit = value.dtype.itemsize
    index = _local_index(m, address, mask, unit, text)[..., None] + np.arange(unit)
    assert m.local is not None
    data = np.ascontiguousarray(np.broadcast_to(value, m.shape))[..., None].view(np.uint8)
    if mask is not None:
        data = np.where(np.broadcast_to(mask, m.shape)[..., None], data, np.take_along_axis(m.local, index, axis=2))
    np.put_along_axis(m.local, index, data, axis=2)


def shared_store(m: State, lanes: Lanes, values: list[Array], number: int) -> None:
    """Write `values`, one array per consecutive element, [CTAs, n] or [n], and tell the checker."""
    unit = values[0].dtype.itemsize
    index = m.shared.index(lanes, unit)
    flat = m.shared.flat[unit]

    def differs() -> Array:
        far = apart(flat[index], values[0])
        for k in range(1, len(values)):
            far = np.maximum(far, apart(flat[index + k], values[k]))
        return far

    m.tick(number)
    tags = None if m.checker is None else m.checker.write(lanes, unit * len(values), differs)
    for k, value in enumerate(values):
        flat[index if k == 0 else index + k] = value
    if m.checker is not None and tags is not None:
        m.checker.wrote(tags, lanes, differs)


@instruction("st")
def build_store(d: Decoder, ins: Instruction) -> Action | None:
    if "async" in ins.modifiers:
        return None
    mods = Modifiers(ins)
    space = space_of(mods)
    vector = mods.take("v2", "v4", "v8")
    mods.drop(*ORDERING, *CACHING)
    types = mods.types()
    mods.end()
    kind = types[0]
    unit, sources = TYPE_BYTES[kind], items(ins.operands[1])
    if len(types) != 1 or space in ("param", "const") or len(sources) != int(vector[1:] if vector else 1):
        raise Unsupported(f"unsupported: {ins.text}")
    numbers = [d.source(o, kind, ins, loose=True) for o in sources]
    base, offset, _ = d.address(ins.operands[0], ins)
    number, size, text = d.current, unit * len(numbers), ins.text

    def store(m: State, mask: Array | None) -> None:
        where, address = resolve(m, space, effective(m, base, offset), mask)
        values = [m.r[n] if m.r[n].dtype.itemsize == unit else m.r[n].astype(UNSIGNED[unit]) for n in numbers]
        if where == "global":
            offsets, chosen = global_lanes(m, address, mask, size, size, text)
            m.counters.add_global("store", address - HEAP_BASE, mask, size, m.shape)
            global_write(m, offsets, chosen, values)
        elif where == "shared":
            lanes = shared_lanes(m, address, mask, size, text)
            count_shared(m, "store", address, mask, size)
            shared_store(m, lanes, [pick(m, lanes, v) for v in values], number)
        elif where == "shared::cluster":
            m.tick(number)
            lanes, flat = remote_lanes(m, address, mask, size, text)
            shared_store(m, lanes, [np.broadcast_to(v, m.shape).reshape(-1)[flat] for v in values], number)
        elif where != "local":
            raise MemoryFault(f"the {where} space is read only: {text}")
        else:
            for k, value in enumerate(values):
                local_write(m, address + k * unit, mask, value, text)

    return store


def global_write(m: State, offsets: Array, chosen: Array | None, values: list[Array]) -> None:
    """Write consecutive elements at each heap offset; of lanes that write one place the highest wins."""
    unit = values[0].dtype.itemsize
    index = offsets >> (unit.bit_length() - 1)
    view = m.memory.views[unit]
    for k, value in enumerate(values):
        wide = np.broadcast_to(value, m.shape)
        if chosen is None:
            view[np.broadcast_to(index + k, m.shape)] = wide
        else:
            view[index + k] = wide.reshape(-1).take(chosen)
