"""cp.async: copies from global to shared memory that land when they are waited for.

Source: PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy, Non-bulk copy". The source is read at
issue; bytes beyond `src-size` are zero.
"""

from dataclasses import dataclass, replace

import numpy as np

from ptx_emulator.core.access import lanes_of
from ptx_emulator.core.decode import Action, Decoder, Modifiers, instruction
from ptx_emulator.core.errors import Unsupported
from ptx_emulator.core.forms.clusters import owner_of
from ptx_emulator.core.forms.loads import CACHING, count_shared, effective, global_lanes
from ptx_emulator.core.forms.mbarriers import MBarriers
from ptx_emulator.core.shared import Lanes
from ptx_emulator.core.spaces import HEAP_BASE, Array
from ptx_emulator.core.state import Part, State
from ptx_emulator.core.syntax import Instruction, Literal, Not, Register


@dataclass
class Copy:
    """A copy in flight. data: [CTAs, n, elements] when the lanes are common, else [n, elements]. group: one number, or
    one per lane."""

    lanes: Lanes
    data: Array
    group: int | Array
    size: int


class Copies(Part):
    """The copies of a batch that are in flight, and the group that the next one will belong to."""

    def __init__(self, m: State) -> None:
        self.flying: list[Copy] = []
        self.group: int | Array = 0

    def in_flight(self) -> bool:
        """Whether a copy into shared memory is on its way."""
        return bool(self.flying)

    def may_part(self) -> bool:
        """Not while something is on its way, or threads have groups of their own."""
        return not self.flying and isinstance(self.group, int)

    def part(self, m: State, ctas: Array) -> "Copies":
        """The same number of the next group."""
        other = Copies(m)
        other.group = self.group
        return other


@instruction("cp")
def build_copy(d: Decoder, ins: Instruction) -> Action | None:
    if "bulk" in ins.modifiers:
        return None
    mods = Modifiers(ins)
    if mods.take("async") is None:
        raise Unsupported(f"unsupported: {ins.text}")
    if mods.take("mbarrier"):
        return _arrive(d, ins, mods)
    if mods.take("commit_group"):
        mods.end()
        return _commit
    wait = mods.take("wait_group", "wait_all")
    if wait:
        mods.end()
        keep = int(ins.operands[0].text, 0) if wait == "wait_group" else -1  # type: ignore[union-attr]
        number = d.current
        return lambda m, mask: _wait(m, mask, keep, number)
    if mods.take("ca", "cg") is None or mods.take("shared", "shared::cta") is None or mods.take("global") is None:
        raise Unsupported(f"unsupported: {ins.text}")
    mods.drop(*CACHING)
    mods.end()
    return _issue(d, ins)


def _issue(d: Decoder, ins: Instruction) -> Action:
    to, to_offset, _ = d.address(ins.operands[0], ins)
    source, source_offset, _ = d.address(ins.operands[1], ins)
    if not isinstance(ins.operands[2], Literal) or int(ins.operands[2].text, 0) not in (4, 8, 16):
        raise Unsupported(f"unsupported: {ins.text}")
    size = int(ins.operands[2].text, 0)
    limit: int | None = None
    ignored: tuple[int, bool] | None = None
    if len(ins.operands) > 3:
        last = ins.operands[3]
        if isinstance(last, Not) or (isinstance(last, Register) and d.predicate[last.index]):
            ignored = d.predicate_source(last, ins)
        elif "L2::cache_hint" not in ins.modifiers or len(ins.operands) > 4:
            limit = d.source(last, "u32", ins)
    number, text = d.current, ins.text

    def issue(m: State, mask: Array | None) -> None:
        address = effective(m, to, to_offset)
        lanes = lanes_of(m, address, mask)
        m.shared.check(lanes.address, size, size, text)
        m.tick(number)
        if m.checker is not None:
            m.checker.copy_issued(lanes, size)
        count_shared(m, "store", address, mask, size)
        if ignored is not None:
            flag = ~m.r[ignored[0]] if ignored[1] else m.r[ignored[0]]
            wanted = np.where(flag, 0, size)
        else:
            wanted = np.full((1, 1), size) if limit is None else m.r[limit]
        if mask is not None:  # what an inactive lane holds there means nothing
            wanted = np.where(mask, wanted, 0)
        data = _read(m, effective(m, source, source_offset), mask, wanted, size, text)
        data = data[:, lanes.thread] if lanes.cta is None else data[lanes.cta, lanes.thread]
        group = m.of(Copies).group
        if not isinstance(group, int):
            lanes, data, group = _per_lane(m, lanes, data, group)
        m.of(Copies).flying.append(Copy(lanes, data, group, size))

    return issue


def _read(m: State, address: Array, mask: Array | None, wanted: Array, size: int, text: str) -> Array:
    """Source data, [CTAs, threads, elements of 4 or 8 bytes], zero beyond the `wanted` bytes."""
    unit = 8 if size >= 8 else 4
    if int(wanted.max()) > size:
        raise Unsupported(f"unsupported: src-size {int(wanted.max())} above cp-size in {text}")
    take = wanted == size
    whole = None if take.all() else take
    inside = whole if mask is None else mask if whole is None else whole & mask
    out = np.zeros((*m.shape, size // unit), np.uint64 if unit == 8 else np.uint32)
    view = m.memory.views[unit]
    if inside is None or inside.any():
        offsets, chosen = global_lanes(m, address, inside, size, size, text)
        index = offsets >> (unit.bit_length() - 1)
        for k in range(size // unit):
            if chosen is None:
                out[:, :, k] = view.take(index + k)
            else:
                out.reshape(m.lanes, -1)[chosen, k] = view.take(index + k)
        m.counters.add_global("load", address - HEAP_BASE, inside, size, m.shape)
        m.counters.async_copy_bytes += size * (m.lanes if chosen is None else len(chosen))
    if whole is not None:
        partial = (wanted > 0) & ~take
        if mask is not None:
            partial = partial & mask
        if partial.any():
            _partial(m, address, np.broadcast_to(partial, m.shape), np.broadcast_to(wanted, m.shape), out, text)
    return out


def _partial(m: State, address: Array, partial: Array, wanted: Array, out: Array, text: str) -> None:
    """Lanes that copy some bytes and zero the rest."""
    data = out.view(np.uint8)
    offsets = np.broadcast_to(address - HEAP_BASE, m.shape)
    for size in np.unique(wanted[partial]):
        lanes = partial & (wanted == size)
        m.memory.check(offsets[lanes], int(size), 1, text)
        data[lanes, : int(size)] = m.memory.heap[offsets[lanes][:, None] + np.arange(int(size))]
        m.counters.add_global("load", offsets, lanes, int(size), m.shape)
        m.counters.async_copy_bytes += int(size) * int(lanes.sum())


def _per_lane(m: State, lanes: Lanes, data: Array, group: int | Array) -> tuple[Lanes, Array, Array]:
    """The same lanes written out for every CTA, with a group number each; `group` is (CTAs, threads) or one number."""
    if lanes.cta is None:
        count = len(lanes.thread)
        cta = np.repeat(np.arange(m.ctas), count)
        thread = np.tile(lanes.thread, m.ctas)
        lanes = Lanes(False, np.tile(lanes.address, m.ctas), thread, cta, False)
        data = data.reshape(m.ctas * count, -1)
    assert lanes.cta is not None
    numbers = np.full(len(lanes.thread), group) if isinstance(group, int) else group[lanes.cta, lanes.thread]
    return lanes, data, numbers


def _commit(m: State, mask: Array | None) -> None:
    state = m.of(Copies)
    if mask is None:
        state.group = state.group + 1
        return
    groups = np.full(m.shape, state.group) if isinstance(state.group, int) else state.group.copy()
    groups[np.broadcast_to(mask, m.shape)] += 1
    state.group = groups


def _wait(m: State, mask: Array | None, keep: int, number: int, agent: int | None = None) -> None:
    """Land every copy of the waiting threads except those of their newest `keep` groups;
    -1 lands uncommitted ones too. agent: who tells of it, in place of the threads."""
    m.tick(number)
    state = m.of(Copies)
    copies, state.flying = state.flying, []
    current = state.group
    for copy in copies:
        if mask is None and isinstance(current, int) and isinstance(copy.group, int):
            if copy.group < current - keep:
                _land(m, copy, agent)
            else:
                state.flying.append(copy)
            continue
        if isinstance(copy.group, int):
            lanes, data, groups = _per_lane(m, copy.lanes, copy.data, copy.group)
            copy = Copy(lanes, data, groups, copy.size)
        assert copy.lanes.cta is not None
        assert not isinstance(copy.group, int)
        place = (copy.lanes.cta, copy.lanes.thread)
        waits = np.broadcast_to(True if mask is None else mask, m.shape)[place]
        newest = current if isinstance(current, int) else current[place]
        done = waits & (copy.group < newest - keep)
        for chosen, landing in ((done, True), (~done, False)):
            if chosen.any():
                part = Copy(
                    replace(
                        copy.lanes, address=copy.lanes.address[chosen], thread=place[1][chosen], cta=place[0][chosen]
                    ),
                    copy.data[chosen],
                    copy.group[chosen],
                    copy.size,
                )
                if landing:
                    _land(m, part, agent)
                else:
                    state.flying.append(part)
    if m.checker is not None:
        m.checker.flying = m.in_flight()


def _arrive(d: Decoder, ins: Instruction, mods: Modifiers) -> Action:
    """cp.async.mbarrier.arrive: an arrival once the thread's copies so far have landed, which they do at once.

    Without `.noinc` the phase waits for one arrival more, so that this one changes nothing else.
    """
    mods.drop("shared", "shared::cta", "b64")
    arrives, counts = mods.take("arrive") is not None, mods.take("noinc") is not None
    mods.end()
    if not arrives or len(ins.operands) != 1:
        raise Unsupported(f"unsupported: {ins.text}")
    base, offset, _ = d.address(ins.operands[0], ins)
    number, text = d.current, ins.text

    def act(m: State, mask: Array | None) -> None:
        lanes = np.broadcast_to(True if mask is None else mask, m.shape)
        addresses = np.where(lanes, m.full(effective(m, base, offset)), -1)
        for cta, address in {(int(c), int(addresses[c, t])) for c, t in np.argwhere(lanes)}:
            here = lanes & (addresses == address) & (np.arange(m.ctas) == cta)[:, None]
            owner, place = owner_of(m, cta, address, text, remote=False)
            b = m.of(MBarriers).find(owner, place, m.agent(cta, int(np.argmax(here[cta]))), text)
            _wait(m, here, -1, number, b.agent)
            m.of(MBarriers).landed(b, 0, text)
            if counts:
                m.of(MBarriers).arrive(b, int(here.sum()), text)

    return act


def _land(m: State, copy: Copy, agent: int | None) -> None:
    unit = copy.data.dtype.itemsize
    index = m.shared.index(copy.lanes, unit)
    flat = m.shared.flat[unit]
    for k in range(copy.data.shape[-1]):
        flat[index + k] = copy.data[..., k]
    if m.checker is not None:
        m.checker.copy_landed(copy.lanes, copy.size, agent)
