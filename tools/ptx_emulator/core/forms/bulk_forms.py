"""The instructions that move data in bulk: cp.async.bulk, its tensor and reducing forms, st.async and red.async."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ptx_emulator.core.decode import Action, Decoder, Modifiers, instruction, items
from ptx_emulator.core.errors import EmulationError, Misaligned, Unsupported
from ptx_emulator.core.formats import CANONICAL_NAN
from ptx_emulator.core.forms.atomics import update_of
from ptx_emulator.core.forms.bulk import CHUNK, Arriving, Box, Bulk, Leaving, own_address, straight
from ptx_emulator.core.forms.clusters import owner_of
from ptx_emulator.core.forms.loads import CACHING, ORDERING, effective
from ptx_emulator.core.forms.mbarriers import active
from ptx_emulator.core.spaces import HEAP_BASE, Array
from ptx_emulator.core.state import State
from ptx_emulator.core.syntax import TYPE_BYTES, Instruction, Literal, Operand, Tile
from ptx_emulator.core.tensor_maps import box_places, tensor_map

OPERATIONS = ("add", "min", "max", "inc", "dec", "and", "or", "xor")
TOLD = "mbarrier::complete_tx::bytes"
DIMENSIONS = tuple(f"{n}d" for n in range(1, 6))


class Lane:
    """Reads operands for one lane."""

    def __init__(self, m: State, cta: int, thread: int) -> None:
        self.m: State = m
        self.cta: int = cta
        self.thread: int = thread

    def value(self, register: int) -> int:
        """A register's value, unsigned."""
        return int(self.m.full(self.m.r[register])[self.cta, self.thread])

    def signed(self, register: int) -> int:
        """A 32-bit register's value, signed."""
        value = self.value(register) & 0xFFFFFFFF
        return value - (1 << 32) if value >> 31 else value

    def address(self, pair: tuple[int, int]) -> int:
        """The address [register + offset]."""
        return int(self.m.full(effective(self.m, *pair))[self.cta, self.thread])


class Target:
    """The two operands that name where data go in a cluster's shared memory, and the mbarrier there that is told."""

    def __init__(self, d: Decoder, to: Operand, bar: Operand, ins: Instruction) -> None:
        self.to: tuple[int, int] = d.address(to, ins)[:2]
        self.bar: tuple[int, int] = d.address(bar, ins)[:2]
        self.number: int = d.current
        self.text: str = ins.text

    def lanes(self, m: State, mask: Array | None) -> Iterator[tuple[Lane, int, int, int]]:
        """Each active lane, with (CTA, address in its memory, address of its mbarrier); a step passes before each."""
        for cta, thread in active(m, mask):
            m.tick(self.number)
            lane = Lane(m, cta, thread)
            owner, address = owner_of(m, cta, lane.address(self.to), self.text, remote=True)
            told, barrier = owner_of(m, cta, lane.address(self.bar), self.text, remote=True)
            if told != owner:
                raise EmulationError(f"the data go to another CTA than their mbarrier is in: {self.text}")
            yield lane, owner, address, barrier


class Place:
    """An operand that names global memory: an address and a size, or a box of a tensor."""

    def __init__(self, d: Decoder, operand: Operand, size: Operand | None, dimensions: str | None, ins: Instruction):
        self.text: str = ins.text
        self.tile: bool = isinstance(operand, Tile)
        self.rank: int = int((dimensions or "0d")[0])
        self.base: tuple[int, int]
        self.size: int = -1
        self.coordinates: list[int] = []
        if isinstance(operand, Tile):
            self.base = (d.source(operand.map, "u64", ins), 0)
            self.coordinates = [d.source(o, "u32", ins) for o in operand.coordinates]
            if len(self.coordinates) != self.rank:
                raise Unsupported(f"unsupported: {ins.text}")
        else:
            self.base = d.address(operand, ins)[:2]
            self.size = d.source(size, "u32", ins) if size is not None else -1
        if self.tile != (self.rank > 0):
            raise Unsupported(f"unsupported: {ins.text}")

    def box(self, lane: Lane, shared: int, unit: int) -> tuple[Box, Array | None, str]:
        """(the box, what fills the outside, the elements' type) with its place in shared memory."""
        if not self.tile:
            size, address = lane.value(self.size), lane.address(self.base)
            _whole_chunks(shared, address, size, self.text)
            return straight(shared, address, size, unit), None, ""
        found = tensor_map(lane.m, lane.address(self.base), self.rank, self.text, lane.cta)
        corner = tuple(lane.signed(register) for register in self.coordinates)
        places, inside, heap = box_places(found, corner, shared, self.text)
        fill = CANONICAL_NAN.get(found.element) if found.fill == "nan" else None
        return Box(found.element, places, heap, inside), fill, found.type


def _given(data: Array) -> Array:
    return data


def _whole_chunks(shared: int, other: int, size: int, text: str) -> None:
    for what, value in (("shared address", shared), ("address", other), ("size", size)):
        if value % CHUNK:
            raise Misaligned(f"the {what} {value:#x} of a bulk copy is no multiple of {CHUNK}: {text}")


@instruction("cp")
def build_bulk(d: Decoder, ins: Instruction) -> Action | None:
    if "bulk" not in ins.modifiers:
        return None
    mods = Modifiers(ins)
    reduces = mods.take("reduce") is not None
    for name in ("async", "bulk"):
        mods.take(name)
    if mods.take("commit_group", "wait_group"):
        return _group(d, ins)
    operation = mods.take(*OPERATIONS) if reduces else None
    tensor = mods.take("tensor") is not None
    dimensions = mods.take(*DIMENSIONS) if tensor else None
    if mods.take("prefetch"):
        return _prefetch(d, ins, dimensions)
    multicast = mods.take("multicast::cluster") is not None
    hint = mods.take("L2::cache_hint") is not None
    told, grouped = mods.take(TOLD) is not None, mods.take("bulk_group") is not None
    mods.drop("tile", "noftz")
    kinds = mods.types()
    way = tuple(mods.left[:2])
    mods.left = mods.left[2:]
    mods.end()
    if (reduces and operation is None) or (tensor and dimensions is None) or told == grouped:
        raise Unsupported(f"unsupported: {ins.text}")
    if (len(kinds) == 1) != (reduces and not tensor) or len(kinds) > 1:
        raise Unsupported(f"unsupported: {ins.text}")
    kind = kinds[0] if kinds else ""
    operands = list(ins.operands[: len(ins.operands) - hint])
    if grouped and way == ("global", "shared::cta") and not multicast:
        return _store(d, ins, operands, dimensions, operation, kind)
    if not told or way[0] not in ("shared::cluster", "shared::cta") or len(way) != 2:
        raise Unsupported(f"unsupported: {ins.text}")
    if way[1] == "global" and not reduces:
        return _load(d, ins, operands, dimensions, multicast)
    if way == ("shared::cluster", "shared::cta") and not tensor and not multicast:
        return _across(d, ins, operands, operation, kind)
    raise Unsupported(f"unsupported: {ins.text}")


def _group(d: Decoder, ins: Instruction) -> Action:
    """commit_group, and wait_group with how many of the newest groups may go on."""
    mods = Modifiers(ins)
    for name in ("async", "bulk"):
        mods.take(name)
    what, reading = mods.take("commit_group", "wait_group"), mods.take("read") is not None
    mods.end()
    keep = ins.operands[0] if ins.operands else None
    if (what == "wait_group") != isinstance(keep, Literal) or (reading and what != "wait_group"):
        raise Unsupported(f"unsupported: {ins.text}")
    newest, number = int(keep.text, 0) if isinstance(keep, Literal) else 0, d.current

    def act(m: State, mask: Array | None) -> None:
        m.tick(number)
        for cta, thread in active(m, mask):
            if what == "commit_group":
                m.of(Bulk).commit(cta, thread)
            else:
                m.of(Bulk).wait(cta, thread, newest, reading)

    return act


def _prefetch(d: Decoder, ins: Instruction, dimensions: str | None) -> Action:
    """To L2: changes no value, but must not lie outside of memory."""
    mods = Modifiers(ins)
    mods.drop("async", "bulk", "tensor", "prefetch", "L2", "global", "tile", "L2::cache_hint", *DIMENSIONS)
    mods.end()
    place = Place(d, ins.operands[0], None if dimensions else ins.operands[1], dimensions, ins)

    def act(m: State, mask: Array | None) -> None:
        for cta, thread in active(m, mask):
            box, _, _ = place.box(Lane(m, cta, thread), 1024, 4)
            m.memory.check(box.heap[box.inside], box.unit, box.unit, ins.text)

    return act


def _load(d: Decoder, ins: Instruction, operands: list[Operand], dimensions: str | None, multicast: bool) -> Action:
    """From global memory into the shared memory of a CTA, or of all that the mask names."""
    size = None if dimensions else operands.pop(2)
    if len(operands) != 3 + multicast:
        raise Unsupported(f"unsupported: {ins.text}")
    goal = Target(d, operands[0], operands[2], ins)
    place = Place(d, operands[1], size, dimensions, ins)
    ctas = d.source(operands[3], "b16", ins) if multicast else -1
    number, text = d.current, ins.text

    def act(m: State, mask: Array | None) -> None:
        for lane, owner, address, barrier in goal.lanes(m, mask):
            box, fill, _ = place.box(lane, address, 8)
            data = m.of(Bulk).load(box, fill, text)
            for target in _targets(m, lane.cta, owner, lane.value(ctas) if multicast else None, text):
                copy = Arriving(target, box, partial(_given, data), barrier, number, text)
                m.of(Bulk).send(copy, m.agent(lane.cta, lane.thread), lane.cta)

    return act


def _targets(m: State, cta: int, owner: int, mask: int | None, text: str) -> list[int]:
    """The CTAs that a copy goes to."""
    if mask is None:
        return [owner]
    if not mask or mask >> m.cluster:
        raise EmulationError(f"a multicast to the CTAs {mask:#x} of a cluster of {m.cluster}: {text}")
    first = cta // m.cluster * m.cluster
    return [first + rank for rank in range(m.cluster) if mask >> rank & 1]


def _across(d: Decoder, ins: Instruction, operands: list[Operand], operation: str | None, kind: str) -> Action:
    """From the own shared memory into a CTA's of the cluster."""
    if len(operands) != 4:
        raise Unsupported(f"unsupported: {ins.text}")
    goal, source = Target(d, operands[0], operands[3], ins), d.address(operands[1], ins)[:2]
    size, update = d.source(operands[2], "u32", ins), update_of(operation, kind) if operation else None
    unit, number, text = TYPE_BYTES[kind] if kind else 8, d.current, ins.text

    def act(m: State, mask: Array | None) -> None:
        for lane, owner, address, barrier in goal.lanes(m, mask):
            cta = lane.cta
            start, count = own_address(m, cta, lane.address(source), text), lane.value(size)
            _whole_chunks(address, start, count, text)
            box = straight(address, HEAP_BASE, count, unit)
            m.shared.check(np.array([start, start + count - unit]), unit, unit, text)
            index = m.shared.bases[unit][cta, 0] + start // unit + np.arange(count // unit)
            checker, pinned = m.of(Bulk).checker, None
            if checker is not None:
                pinned = (cta, checker.cells(cta, start + np.arange(0, count, CHUNK), CHUNK))
            read = partial(m.shared.flat[unit].take, index)
            copy = Arriving(owner, box, read, barrier, number, text, update, pinned)
            m.of(Bulk).send(copy, m.agent(cta, lane.thread), cta)

    return act


def _store(
    d: Decoder,
    ins: Instruction,
    operands: list[Operand],
    dimensions: str | None,
    operation: str | None,
    kind: str,
) -> Action:
    """From shared to global memory, in the thread's bulk group."""
    if len(operands) != (2 if dimensions else 3):
        raise Unsupported(f"unsupported: {ins.text}")
    place = Place(d, operands[0], None if dimensions else operands[2], dimensions, ins)
    source = d.address(operands[1], ins)[:2]
    unit, number, text = TYPE_BYTES[kind] if kind else 8, d.current, ins.text

    def act(m: State, mask: Array | None) -> None:
        for cta, thread in active(m, mask):
            m.tick(number)
            lane = Lane(m, cta, thread)
            box, _, found = place.box(lane, own_address(m, cta, lane.address(source), text), unit)
            update = update_of(operation, kind or found) if operation else None
            m.of(Bulk).store(Leaving(cta, box, number, update, None), thread, text)

    return act


@instruction("st", "red")
def build_async(d: Decoder, ins: Instruction) -> Action | None:
    """st.async and red.async: a few bytes for the memory of a CTA of the cluster, told to an mbarrier there."""
    if "async" not in ins.modifiers:
        return None
    mods = Modifiers(ins)
    mods.take("async")
    told, vector = mods.take(TOLD), mods.take("v2", "v4")
    operation = mods.take(*OPERATIONS) if ins.root == "red" else None
    mods.drop("shared::cluster", *ORDERING, *CACHING)
    kinds = mods.types()
    mods.end()
    values = items(ins.operands[1])
    if not told or len(kinds) != 1 or (ins.root == "red") != (operation is not None) or len(ins.operands) != 3:
        raise Unsupported(f"unsupported: {ins.text}")
    kind = kinds[0]
    unit = TYPE_BYTES[kind]
    if len(values) != int(vector[1:] if vector else 1) or unit < 4:
        raise Unsupported(f"unsupported: {ins.text}")
    goal = Target(d, ins.operands[0], ins.operands[2], ins)
    sources = [d.source(o, kind, ins) for o in values]
    update, number, text = update_of(operation, kind) if operation else None, d.current, ins.text

    def act(m: State, mask: Array | None) -> None:
        for lane, owner, address, barrier in goal.lanes(m, mask):
            if address % (unit * len(sources)):
                raise Misaligned(f"shared address {address:#x} is no multiple of {unit * len(sources)}: {text}")
            box = replace(straight(address, HEAP_BASE, unit * len(sources), unit), width=unit)
            data: Any = np.array([lane.value(s) for s in sources], m.shared.flat[unit].dtype)
            copy = Arriving(owner, box, partial(_given, data), barrier, number, text, update)
            m.of(Bulk).send(copy, m.agent(lane.cta, lane.thread), lane.cta, f"{ins.root}.async", fenced=False)

    return act
