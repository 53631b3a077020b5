"""atom and red. Source: PTX ISA, "Parallel Synchronization and Communication Instructions: atom, red"."""

from collections.abc import Callable

import numpy as np

from ptx_emulator.core.access import pick
from ptx_emulator.core.decode import Action, Decoder, Modifiers, choose, instruction, items
from ptx_emulator.core.errors import Unsupported
from ptx_emulator.core.formats import FROM_F32, TO_F32, canonical
from ptx_emulator.core.forms.clusters import put, remote_lanes
from ptx_emulator.core.forms.floating import typed
from ptx_emulator.core.forms.loads import (
    CACHING,
    ORDERING,
    count_shared,
    effective,
    global_lanes,
    resolve,
    shared_lanes,
    space_of,
)
from ptx_emulator.core.spaces import HEAP_BASE, UNSIGNED, Array
from ptx_emulator.core.state import State
from ptx_emulator.core.syntax import TYPE_BYTES, Instruction

Update = Callable[..., Array]


def update_of(name: str, kind: str) -> Update:
    """(old, operand, second operand) -> new, all as registers of type `kind`."""
    unsigned = UNSIGNED[TYPE_BYTES[kind]]
    if name == "exch":
        return lambda old, b, c: b
    if name == "cas":
        return lambda old, b, c: choose(old == b, c, old)
    if name in ("inc", "dec"):
        if name == "inc":
            return lambda old, b, c: np.where(old >= b, np.zeros_like(old), old + np.ones_like(old))
        return lambda old, b, c: np.where((old == 0) | (old > b), b, old - np.ones_like(old))
    function: np.ufunc = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]
    if kind.endswith("x2"):
        half = update_of(name, kind.removesuffix("x2"))

        def packed(old: Array, b: Array, c: Array) -> Array:
            pairs = [np.ascontiguousarray(v).view(np.uint16) for v in (old, b)]
            return half(pairs[0], pairs[1], pairs[1]).view(np.uint32)

        return packed
    if kind in TO_F32:
        up, down = TO_F32[kind], FROM_F32[kind]
        return lambda old, b, c: down(function(up(old), up(b)))
    read = typed(kind)
    if kind == "f32":
        return lambda old, b, c: canonical(function(read(old), read(b)))
    return lambda old, b, c: function(read(old), read(b)).view(unsigned)


def apply_in_order(flat: Array, index: Array, update: Update, b: Array, c: Array) -> Array:
    """Update `flat[index]` lane after lane and return what each lane found. All arguments but `flat` are [n]."""
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    start = np.ones(len(index), bool)
    start[1:] = ordered[1:] != ordered[:-1]
    place = np.arange(len(index))
    rank = place - np.maximum.accumulate(np.where(start, place, 0))
    old = np.zeros(len(index), flat.dtype)
    for turn in range(int(rank.max(initial=-1)) + 1):
        lanes = order[rank == turn]
        found = flat[index[lanes]]
        old[lanes] = found
        flat[index[lanes]] = update(found, b[lanes], c[lanes])
    return old


@instruction("atom", "red")
def build_atomic(d: Decoder, ins: Instruction) -> Action | None:
    if "async" in ins.modifiers:
        return None
    mods = Modifiers(ins)
    space = space_of(mods)
    vector = mods.take("v2", "v4", "v8")
    name = mods.take("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    mods.drop(*ORDERING, *CACHING)
    types = mods.types()
    mods.end()
    if len(types) != 1 or name is None:
        raise Unsupported(f"unsupported: {ins.text}")
    kind = types[0]
    unit = TYPE_BYTES[kind]
    operands = list(ins.operands)
    targets = items(operands.pop(0)) if ins.root == "atom" else ()
    outs = [d.destination(o, kind, ins) for o in targets]
    base, offset, _ = d.address(operands[0], ins)
    sources = [d.source(o, kind, ins) for o in items(operands[1])]
    seconds = [d.source(o, kind, ins) for o in items(operands[2])] if name == "cas" else sources
    if len(sources) != int(vector[1:] if vector else 1):
        raise Unsupported(f"unsupported: {ins.text}")
    update, size, text, number = update_of(name, kind), unit * len(sources), ins.text, d.current

    def _in_cluster(m: State, address: Array, mask: Array | None) -> None:
        m.tick(number)
        lanes, flat = remote_lanes(m, address, mask, size, text)
        if m.checker is not None:
            m.checker.atomic(lanes, size)
        index = m.shared.index(lanes, unit)
        for k, (source, second) in enumerate(zip(sources, seconds, strict=True)):
            values = [np.broadcast_to(m.r[n], m.shape).reshape(-1)[flat] for n in (source, second)]
            old = apply_in_order(m.shared.flat[unit], index + k, update, *values)
            if outs:
                put(m, outs[k], flat, old)

    def atomic(m: State, mask: Array | None) -> None:
        where, address = resolve(m, space, effective(m, base, offset), mask)
        m.counters.atomic_operations += (
            m.lanes if mask is None else int(np.count_nonzero(np.broadcast_to(mask, m.shape)))
        )
        if where == "shared":
            lanes = shared_lanes(m, address, mask, size, text)
            count_shared(m, "store", address, mask, size)
            m.tick(number)
            if m.checker is not None:
                m.checker.atomic(lanes, size)
            index = m.shared.index(lanes, unit).reshape(-1)
            for k, (source, second) in enumerate(zip(sources, seconds, strict=True)):
                values = [pick(m, lanes, m.r[n]).reshape(-1) for n in (source, second)]
                old = apply_in_order(m.shared.flat[unit], index + k, update, *values)
                if outs:
                    if lanes.everyone:
                        m.r[outs[k]] = old.reshape(m.shape)
                    else:
                        whole = np.array(np.broadcast_to(m.r[outs[k]], m.shape))
                        whole[np.broadcast_to(mask, m.shape)] = old  # type: ignore[arg-type]
                        m.r[outs[k]] = whole
            return
        if where == "shared::cluster":
            _in_cluster(m, address, mask)
            return
        if where != "global":
            raise Unsupported(f"unsupported: {text}")
        active = np.broadcast_to(True if mask is None else mask, m.shape)
        offsets, chosen = global_lanes(m, address, active, size, size, text)
        m.counters.add_global("store", address - HEAP_BASE, mask, size, m.shape)
        for k, (source, second) in enumerate(zip(sources, seconds, strict=True)):
            values = [np.broadcast_to(m.r[n], m.shape).reshape(-1)[chosen] for n in (source, second)]
            old = apply_in_order(m.memory.views[unit], offsets // unit + k, update, *values)
            if outs:
                whole = np.array(np.broadcast_to(m.r[outs[k]], m.shape))
                whole.reshape(-1)[chosen] = old
                m.r[outs[k]] = whole

    return atomic
