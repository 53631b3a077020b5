"""Bulk copies: the machinery of what lands in shared memory and tells an mbarrier, and of what leaves it in groups.

Source: PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy, Bulk and Tensor copy" and "Completion
mechanisms". A copy may land at any time between its issue and the moment that its completion is known. The emulator
takes the first ("early"), the last ("late") or, under a seeded schedule, any ("random"); what is right is right under
all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ptx_emulator.core.clocks import ClusterChecker
from ptx_emulator.core.errors import MemoryFault
from ptx_emulator.core.forms.clusters import owner_of, touch
from ptx_emulator.core.forms.mbarriers import MBarriers
from ptx_emulator.core.spaces import HEAP_BASE, Array
from ptx_emulator.core.state import Part, State

CHUNK = 16  # bytes: bulk copies move whole ones
LANDINGS = ("early", "late", "random")
Update = Callable[..., Array]


@dataclass
class Box:
    """Elements in shared memory and where they lie in global memory.

    unit: bytes of an element. shared: byte address of each, [n]. heap: heap offset of each. inside: which of them exist
    in global memory. width: the aligned bytes that shared memory holds together, for the checks.
    """

    unit: int
    shared: Array
    heap: Array
    inside: Array
    width: int = CHUNK

    @property
    def bytes(self) -> int:
        """Bytes in shared memory: what an mbarrier is told."""
        return self.unit * len(self.shared)


def straight(shared: int, address: int, size: int, unit: int) -> Box:
    """`size` bytes in a row."""
    steps = np.arange(0, size, unit)
    return Box(unit, shared + steps, address - HEAP_BASE + steps, np.ones(len(steps), bool))


@dataclass
class Arriving:
    """What is on its way into the shared memory of one CTA.

    read: gives the elements, at the latest when they land. barrier: address of the mbarrier there that is told.
    source: (CTA, granules) of shared memory that is read until then. update: of a reduction. cells: the granules that
    the copy writes, for the checks.
    """

    cta: int
    box: Box
    read: Callable[[], Array]
    barrier: int
    number: int
    text: str
    update: Update | None = None
    source: tuple[int, Array] | None = None
    cells: Array | None = None


@dataclass
class Leaving:
    """What is on its way from a CTA's shared memory to global memory, issued by one thread."""

    cta: int
    box: Box
    number: int
    update: Update | None
    cells: Array | None
    data: Array | None = None
    known: bool = False  # the thread knows that the source was read
    written: bool = False


@dataclass
class Groups:
    """The bulk groups of one thread: those committed, oldest first, and the open one."""

    closed: list[list[Leaving]] = field(default_factory=list)
    open: list[Leaving] = field(default_factory=list)


class Bulk(Part):
    """The bulk copies of a batch."""

    def __init__(self, m: State) -> None:
        self.m: State = m
        self.landing: str = m.landing
        self.arriving: list[Arriving] = []
        self.groups: dict[tuple[int, int], Groups] = {}

    @property
    def checker(self) -> ClusterChecker | None:
        """The batch's checker."""
        checker = self.m.checker
        return checker if isinstance(checker, ClusterChecker) else None

    def load(self, global_box: Box, fill: Array | None, text: str) -> Array:
        """The elements of a box from global memory; `fill` outside of the tensor."""
        unit, inside = global_box.unit, global_box.inside
        heap = global_box.heap[inside]
        self.m.memory.check(heap, unit, unit, text)
        data = self.m.memory.views[unit].take(heap // unit)
        self.m.counters.async_copy_bytes += unit * len(heap)
        self.m.counters.global_load_bytes += unit * len(heap)
        self.m.counters.global_load_sectors += len(np.unique(heap >> 5))
        if inside.all():
            return data
        out = np.full(len(inside), 0 if fill is None else fill, data.dtype)
        out[inside] = data
        return out

    def send(self, copy: Arriving, who: int, issuer: int, kind: str = "bulk copy", fenced: bool = True) -> None:
        """Agent `who`, of the CTA `issuer`, starts a copy into shared memory. fenced: it needs a proxy fence."""
        m = self.m
        m.shared.check(copy.box.shared, copy.box.unit, copy.box.unit, copy.text)
        m.of(MBarriers).find(copy.cta, copy.barrier, who, copy.text)
        touch(m, copy.cta, issuer, who, copy.text)
        if self.checker is not None:
            copy.cells = self.checker.cells(copy.cta, copy.box.shared, copy.box.width)
            self.checker.bulk_write(copy.cta, copy.cells, who, kind, fenced)
            if copy.source is not None:
                self.checker.bulk_read(copy.source[0], copy.source[1], who)
        self.arriving.append(copy)
        if self.landing == "early":
            self.land(len(self.arriving) - 1)

    def land(self, position: int) -> None:
        """One copy lands and tells its mbarrier."""
        m, copy = self.m, self.arriving.pop(position)
        m.tick(copy.number)
        if not m.live[copy.cta].any():
            raise MemoryFault(f"a copy lands in CTA {int(m.cta_numbers[copy.cta])}, which has ended: {copy.text}")
        unit = copy.box.unit
        flat, index = m.shared.flat[unit], m.shared.bases[unit][copy.cta, 0] + copy.box.shared // unit
        data = copy.read()
        flat[index] = data if copy.update is None else copy.update(flat[index], data, data)
        b = m.of(MBarriers).find(copy.cta, copy.barrier, m.agent(copy.cta, 0), copy.text, check=False)
        if self.checker is not None and copy.cells is not None:
            self.checker.bulk_landed(copy.cells, b.agent)
            if copy.source is not None:
                self.checker.bulk_was_read(copy.source[1], b.agent)
            self.checker.flying = m.in_flight()
        m.of(MBarriers).landed(b, copy.box.bytes, copy.text)
        m.progress += 1

    def land_one(self) -> bool:
        """Let a copy land, the oldest or where they land at random any; False when none is on its way."""
        schedule, count = self.m.schedule, len(self.arriving)
        if count:
            self.land(0 if schedule is None or self.landing != "random" else schedule.any_of(count))
        return count > 0

    def store(self, copy: Leaving, thread: int, text: str) -> None:
        """Start a thread's copy from shared to global memory: check its addresses and count it. It lands later."""
        m, box = self.m, copy.box
        m.shared.check(box.shared, box.unit, box.unit, text)
        heap = box.heap[box.inside]
        m.memory.check(heap, box.unit, box.unit, text)
        m.counters.global_store_bytes += box.unit * len(heap)
        m.counters.global_store_sectors += len(np.unique(heap >> 5))
        if self.checker is not None:
            copy.cells = self.checker.cells(copy.cta, box.shared, box.width)
            self.checker.bulk_read(copy.cta, copy.cells, m.agent(copy.cta, thread))
        self.groups.setdefault((copy.cta, thread), Groups()).open.append(copy)
        if self.landing == "early":
            self._write(copy)

    def _read(self, copy: Leaving) -> Array:
        """The source, read once."""
        if copy.data is None:
            unit = copy.box.unit
            index = self.m.shared.bases[unit][copy.cta, 0] + copy.box.shared // unit
            copy.data = self.m.shared.flat[unit].take(index)
        return copy.data

    def _write(self, copy: Leaving) -> None:
        if copy.written:
            return
        data, box = self._read(copy)[copy.box.inside], copy.box
        view, index = self.m.memory.views[box.unit], box.heap[box.inside] // box.unit
        view[index] = data if copy.update is None else copy.update(view[index], data, data)
        copy.written = True

    def commit(self, cta: int, thread: int) -> None:
        """What the thread has issued since its last commit is a group."""
        groups = self.groups.setdefault((cta, thread), Groups())
        groups.closed.append(groups.open)
        groups.open = []

    def wait(self, cta: int, thread: int, keep: int, reading: bool) -> None:
        """The thread knows that all but its newest `keep` groups have been read, or are done. reading: the first."""
        groups = self.groups.setdefault((cta, thread), Groups())
        done = len(groups.closed) - keep
        for group in groups.closed[: max(done, 0)]:
            for copy in group:
                self._read(copy)
                if not copy.known and self.checker is not None and copy.cells is not None:
                    self.checker.bulk_was_read(copy.cells, self.m.agent(cta, thread))
                copy.known = True
                if not reading:
                    self._write(copy)
        if not reading and done > 0:
            groups.closed = groups.closed[done:]

    def in_flight(self) -> bool:
        """Whether a copy into shared memory is on its way."""
        return bool(self.arriving)

    def ended(self, ended: Array) -> None:
        """CTAs have left: report what still reads or writes their memory, and let it happen now."""
        for (cta, _), groups in self.groups.items():
            if not ended[cta]:
                continue
            for copy in [*groups.open, *(one for group in groups.closed for one in group)]:
                if not copy.known:
                    self._note("CTA ends while a bulk copy may still read its memory", copy.number, cta)
                self._write(copy)
        for late in self.arriving:
            if ended[late.cta]:
                self._note("CTA ends while a copy into its memory may be in flight", late.number, late.cta)
        self.arriving = [late for late in self.arriving if not ended[late.cta]]

    def _note(self, kind: str, number: int, cta: int) -> None:
        if self.checker is not None:
            self.checker.note(kind, number, number, cta)


def own_address(m: State, cta: int, address: int, text: str) -> int:
    """An address that must be of the CTA's own shared memory."""
    return owner_of(m, cta, address, text, remote=False)[1]
