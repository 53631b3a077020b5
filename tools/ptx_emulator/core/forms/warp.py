"""How the threads of a warp exchange values. Source: PTX ISA, "shfl.sync", "vote.sync", "redux.sync", "elect.sync"."""

from dataclasses import dataclass

import numpy as np

from ptx_emulator.core.decode import Action, Decoder, Modifiers, build, instruction
from ptx_emulator.core.errors import EmulationError, Unsupported
from ptx_emulator.core.forms.barriers import gathered, waiting
from ptx_emulator.core.forms.integer import view_type
from ptx_emulator.core.spaces import UNSIGNED, Array
from ptx_emulator.core.state import Part, State, Wait
from ptx_emulator.core.syntax import Instruction, Pair

LANE = np.arange(32, dtype=np.int64)
EVERY = 0xFFFFFFFF  # the member mask that names every lane
UNDEFINED = np.uint32(0x7FFF7FFF)  # what a lane gets from one that takes no part


def source_lane(mode: str, b: Array, c: Array) -> tuple[Array, Array]:
    """(source lane, in range) for each lane; b and c: int64 [..., 32] or [..., 1]."""
    offset, clamp, segment = b & 31, c & 31, (c >> 8) & 31
    low = LANE & segment
    high = low | (clamp & ~segment & 31)
    if mode == "up":
        j = LANE - offset
        inside = j >= high
    else:
        j = LANE + offset if mode == "down" else LANE ^ offset if mode == "bfly" else low | (offset & ~segment & 31)
        inside = j <= high
    return np.where(inside, j, LANE), inside


@instruction("shfl")
def build_shuffle(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    mode = mods.take("bfly", "idx", "up", "down")
    mods.drop("sync")
    if mods.types() != ["b32"] or mode is None:
        raise Unsupported(f"unsupported: {ins.text}")
    mods.end()
    target = ins.operands[0]
    value_out, in_range_out = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    out = d.destination(value_out, "b32", ins)
    predicate = d.destination(in_range_out, "pred", ins) if in_range_out is not None else None
    a, b, c, masks = (d.source(o, "b32", ins) for o in ins.operands[1:5])
    text = ins.text
    known: dict[tuple[int, int], tuple[Array, Array]] = {}

    def lanes(m: State) -> tuple[Array, Array]:
        vb, vc = m.r[b], m.r[c]
        if vb.size == 1 and vc.size == 1:
            key = (int(vb.flat[0]), int(vc.flat[0]))
            if key not in known:
                known[key] = source_lane(mode, np.array(key[0]), np.array(key[1]))
            return known[key]
        shape = np.broadcast_shapes(vb.shape, vc.shape, (1, m.threads))
        wide = [np.broadcast_to(v, shape).reshape(-1, 32).astype(np.int64) for v in (vb, vc)]
        return source_lane(mode, wide[0], wide[1])

    def shuffle(m: State, mask: Array | None) -> None:
        r = m.r
        j, inside = lanes(m)
        value = r[a]
        if value.shape[1] != 1:
            rows = value.reshape(-1, 32)
            value = _take(rows, j).reshape(-1, m.threads)
        members = named_lanes(m, mask, masks, text)
        if not (members == np.uint32(EVERY)).all():
            from_ = j if j.ndim == 1 or len(j) == len(members) else np.tile(j, (len(members) // len(j), 1))
            given = (members >> from_.astype(np.uint32) & np.uint32(1)) != 0
            value = np.where(given.reshape(m.shape), value, UNDEFINED)
        if mask is not None:
            value = np.where(mask, value, r[out])
        r[out] = value
        if predicate is not None:
            flags = np.broadcast_to(inside, (max(1, inside.size // m.threads) * m.warps, 32)).reshape(-1, m.threads)
            r[predicate] = flags if mask is None else np.where(mask, flags, r[predicate])

    return shuffle


def _take(rows: Array, j: Array) -> Array:
    if j.ndim == 1:
        return rows.take(j, axis=1)
    if len(j) < len(rows):
        j = np.tile(j, (len(rows) // len(j), 1))
    elif len(rows) < len(j):
        rows = np.tile(rows, (len(j) // len(rows), 1))
    return np.take_along_axis(rows, j, axis=1)


def _members(m: State, mask: Array | None) -> Array:
    """Which lanes execute: [warps of all CTAs, 32]."""
    return np.broadcast_to(True if mask is None else mask, m.shape).reshape(-1, 32)


def _bits(flags: Array) -> Array:
    """A flag per lane, [rows, 32], as one uint32 a row, [rows, 1]."""
    return np.packbits(flags, axis=1, bitorder="little").view(np.uint32)


def _each_lane(m: State, row: Array) -> Array:
    """A value per warp, [rows, 1], for every lane."""
    return np.repeat(row.reshape(m.ctas, m.warps), 32, axis=1)


def _store(m: State, out: int, value: Array, mask: Array | None) -> None:
    m.r[out] = value if mask is None else np.where(mask, value, m.r[out])


def named_lanes(m: State, mask: Array | None, masks: int, text: str) -> Array:
    """The lanes with which each one exchanges values, as bits, [rows, 1] or [rows, 32]: those that execute the
    instruction and that its member mask names. Raises where a lane's mask leaves out the lane itself."""
    executing, named = _members(m, mask), m.r[masks]
    if mask is None and named.size == 1 and int(named.flat[0]) == EVERY:
        return np.full((len(executing), 1), EVERY, np.uint32)
    if named.size == 1:
        both = _bits(executing) & named.reshape(1, 1)
        if int(named.flat[0]) == EVERY:
            return both
    else:
        both = _bits(executing) & m.full(named).reshape(-1, 32)
    alone = executing & ((both >> LANE.astype(np.uint32) & np.uint32(1)) == 0)
    if alone.any():
        row, lane = (int(i[0]) for i in np.nonzero(alone))
        cta, warp = divmod(row, m.warps)
        raise EmulationError(
            f"thread {32 * warp + lane} of CTA {int(m.cta_numbers[cta])} is not in the mask that it names: {text}"
        )
    return both


def _rows(m: State, row: Array) -> Array:
    """A value per warp, [rows, 1], or per lane, [rows, 32], for every lane."""
    return _each_lane(m, row) if row.shape[1] == 1 else row.reshape(m.shape)


@instruction("vote")
def build_vote(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    mode = mods.take("ballot", "all", "any", "uni")
    mods.drop("sync")
    kind = mods.types()
    mods.end()
    if mode is None or kind != (["b32"] if mode == "ballot" else ["pred"]) or len(ins.operands) != 3:
        raise Unsupported(f"unsupported: {ins.text}")
    out = d.destination(ins.operands[0], kind[0], ins)
    source, negated = d.predicate_source(ins.operands[1], ins)
    masks, text = d.source(ins.operands[2], "b32", ins), ins.text

    def vote(m: State, mask: Array | None) -> None:
        members = named_lanes(m, mask, masks, text)
        flags = np.broadcast_to(~m.r[source] if negated else m.r[source], m.shape).reshape(-1, 32)
        ballot = _bits(flags) & members
        if mode == "ballot":
            value = ballot
        elif mode == "any":
            value = ballot != 0
        elif mode == "all":
            value = ballot == members
        else:
            value = (ballot == 0) | (ballot == members)
        _store(m, out, _rows(m, value), mask)

    return vote


@instruction("activemask")
def build_active(d: Decoder, ins: Instruction) -> Action | None:
    out = d.destination(ins.operands[0], "b32", ins)
    return lambda m, mask: _store(m, out, _each_lane(m, _bits(_members(m, mask))), mask)


@instruction("elect")
def build_elect(d: Decoder, ins: Instruction) -> Action | None:
    target = ins.operands[0]
    if not isinstance(target, Pair):
        raise Unsupported(f"unsupported: {ins.text}")
    out, predicate = d.destination(target.first, "b32", ins), d.destination(target.second, "pred", ins)
    masks, text = d.source(ins.operands[1], "b32", ins), ins.text

    def elect(m: State, mask: Array | None) -> None:
        members = named_lanes(m, mask, masks, text)
        lowest = members & (~members + np.uint32(1))
        leader = _rows(m, np.bitwise_count(lowest - np.uint32(1)).astype(np.uint32))
        lane = np.arange(m.threads, dtype=np.uint32)[None, :] % 32
        _store(m, out, leader, mask)
        _store(m, predicate, leader == lane, mask)

    return elect


@instruction("redux")
def build_reduce(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    name = mods.take("add", "min", "max", "and", "or", "xor")
    mods.drop("sync")
    types = mods.types()
    mods.end()
    if name is None or len(types) != 1 or types[0] not in ("u32", "s32", "b32"):
        raise Unsupported(f"unsupported: {ins.text}")
    kind = types[0]
    view = view_type("u32" if kind == "b32" else kind)
    functions: dict[str, np.ufunc] = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    limits = np.iinfo(view)
    neutral = {
        "add": 0,
        "or": 0,
        "xor": 0,
        "and": -1 if kind == "s32" else limits.max,
        "min": limits.max,
        "max": limits.min,
    }[name]
    out, source = d.destination(ins.operands[0], kind, ins), d.source(ins.operands[1], kind, ins)
    masks, text = d.source(ins.operands[2], "b32", ins), ins.text

    def reduce(m: State, mask: Array | None) -> None:
        members = named_lanes(m, mask, masks, text)
        rows = np.broadcast_to(m.r[source], m.shape).reshape(-1, 32).view(view)
        inside = (members[:, :, None] >> LANE.astype(np.uint32) & np.uint32(1)) != 0  # [rows, 1 or 32, 32]
        kept = np.where(inside, rows[:, None, :], view(neutral))
        _store(m, out, _rows(m, functions[name].reduce(kept, axis=2, dtype=view).view(UNSIGNED[4])), mask)

    return reduce


EXCHANGES = ("shfl", "vote", "redux", "elect")


@dataclass
class Exchange(Wait):
    """An exchange as the end of a block: lanes sleep until all that their masks name have come to this instruction.

    A kernel gets such ends where a lane may sleep while others of its warp go on: at an mbarrier.
    """

    action: Action
    masks: int

    def together(self, m: State, live: Array | None) -> bool:
        """All live lanes are here."""
        m.perform(self.at, self.action, live)
        return True

    def enter(self, m: State, lanes: Array) -> Array:
        """Sleep; `settle` wakes the lanes when the last has come, which may be at once."""
        masks = m.full(m.r[self.masks]).astype(np.int64)
        m.of(Exchanges).mask[lanes] = masks[lanes]
        return lanes

    def tell(self, m: State, lanes: Array) -> str:
        """Who sleeps, for a report of a deadlock."""
        return waiting(m, self.text, lanes, m.of(Exchanges).mask)


class Exchanges(Part):
    """The lanes of a batch that sleep at an exchange, each with its mask; 0: does not."""

    def __init__(self, m: State) -> None:
        self.mask: Array = np.zeros(m.shape, np.int64)

    def settle(self, m: State) -> None:
        """Let the lanes that are complete exchange their values and go on."""
        if not self.mask.any():
            return
        for end, lanes in list(m.sleepers(self.mask > 0)):
            ready = gathered(m, np.where(lanes, self.mask, 0))
            if isinstance(end, Exchange) and ready.any():
                m.perform(end.at, end.action, ready)
                m.wake(ready)
                self.mask[ready] = 0


def exchange(d: Decoder, ins: Instruction) -> Exchange:
    """The block end that an instruction of `EXCHANGES` is."""
    action, guard = build(d, ins), ins.guard
    end = Exchange(d.current, ins.text, action, d.source(ins.operands[-1], "b32", ins))
    end.guard, end.negated = guard.index if guard else None, ins.guard_negated
    return end
