"""Finds shared-memory races and reads of data in flight.

Each granule (4 bytes, fewer when the kernel stores narrower elements) remembers its last writer and two of its readers
as tags `step * 64 + warp`. `seen[row, w, v]` is the last step of warp v that a barrier has made visible to warp w;
an access
races with a later one of another warp when its step is above that. While all CTAs of a batch access the same addresses
they share one row of tags; the first access that differs gives each CTA its own.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx_emulator.core.batch import Batch
from ptx_emulator.core.findings import NEAR, SAME, UNWRITTEN, Fault
from ptx_emulator.core.lanes import LaneOrder
from ptx_emulator.core.shared import Lanes
from ptx_emulator.core.spaces import SHARED_BASE, Array

# granules of one row that a pending wgmma reads, its warpgroup, and its CTAs (None: all)
Region = tuple[Array, int, Array | None]


class Checker:
    """Race bookkeeping of one batch whose warps meet at barriers of their CTA; `clocks.ClusterChecker` knows more."""

    bits = 6  # of a tag that name who accessed
    low = 63  # all of them set: an atomic update
    tag_type: Any = np.int32

    def __init__(self, machine: Batch, granule: int) -> None:
        self.m = machine
        self.granule = granule
        self.count: int = -(-machine.shared.stride // granule)
        self.rows: int = 1
        self.faults: dict[tuple[str, int, int], Fault] = {}
        self.epochs: Array = np.zeros(machine.ctas, np.int64)  # barriers each CTA has passed
        self.floor: int = 0
        warps = machine.warps
        self.seen: Array = np.zeros((1, warps, warps), np.int32)
        self.writer: Array = np.zeros(self.count, self.tag_type)
        self.reader: Array = np.zeros(self.count, self.tag_type)
        self.reader_too: Array = np.zeros(self.count, self.tag_type)
        self.flight: Array = np.zeros(self.count, self.tag_type)
        self.flying: bool = False
        self.operand: Array = np.zeros(self.count, self.tag_type)
        self.operands: Array = np.zeros(self.count, np.int16)
        self.fence: Array = np.zeros((1, warps), np.int32)
        self.lane_order: LaneOrder | None = None

    def watch_lanes(self) -> None:
        """From now on look at the order between the lanes of a warp too; the batch is one CTA, or one cluster."""
        self.lane_order = LaneOrder(self, len(self.writer))

    def last_meeting(self, row: Array, warp: Array) -> Array:
        """The step at which the lanes of a warp last met."""
        met: Array = self.seen[row, warp, warp]
        return met

    def lanes_met(self, warps: Array) -> None:
        """The lanes of these warps, [CTAs, warps], have met; kept where one CTA's warps are looked at."""
        if self.lane_order is not None:
            (met,) = np.nonzero(warps[0])
            self.seen[0, met, met] = self.m.step

    def part(self, machine: Batch) -> "Checker":
        """The account of a part of the batch, while all CTAs share one row; findings go to the same list."""
        other = copy.copy(self)
        other.m, other.epochs = machine, self.epochs[: machine.ctas].copy()
        for name in ("seen", "writer", "reader", "reader_too", "flight", "operand", "operands", "fence"):
            setattr(other, name, getattr(self, name).copy())
        return other

    def _split(self) -> None:
        """Give each CTA its own row."""
        if self.rows != self.m.ctas:
            self.rows = self.m.ctas
            for name in ("writer", "reader", "reader_too", "flight", "operand", "operands"):
                setattr(self, name, np.tile(getattr(self, name), self.rows))
            self.seen = np.repeat(self.seen, self.rows, 0)
            self.fence = np.repeat(self.fence, self.rows, 0)

    def locate(self, lanes: Lanes, size: int) -> tuple[Array, Array, Array]:
        """(granule index [R, n, k], row, warp): R rows (1 unless common and split), n lanes, k granules."""
        first = (lanes.address // self.granule)[None, :, None]
        if lanes.cta is not None:
            self._split()
            row = lanes.cta[None, :, None]
        else:
            row = np.arange(self.rows)[:, None, None]
        index = first + row * self.count
        if size > self.granule:
            index = index + np.arange(size // self.granule)
        return index, row, self.who(lanes)

    def who(self, lanes: Lanes) -> Array:
        """The warp that each lane is in, [1, n, 1]."""
        return (lanes.thread >> 5).astype(np.int32)[None, :, None]

    def leader(self, row: Array, group: int) -> Array:
        """The first warp of a warpgroup, broadcasting with `row`."""
        return np.array(4 * group, np.int32)

    def _unseen(self, tag: Array, row: Array, warp: Array) -> Array:
        """Where an access with `tag` is by another warp and not ordered before what `warp` does now."""
        other = tag & self.low
        unseen = (tag > self.floor) & (other != warp)
        if unseen.any():
            unseen &= (tag >> self.bits) > self.seen[
                row, np.minimum(warp, self.m.warps - 1), np.minimum(other, self.m.warps - 1)
            ]
        return unseen

    def report(self, kind: str, where: Array, tag: Array, index: Array, warp: Array) -> None:
        """Record the first granule of `where` as a fault of the step under way, once per pair of instructions."""
        where = np.broadcast_to(where, index.shape)
        if not where.any():
            return
        tags = np.broadcast_to(tag, index.shape)[where]
        here, places, warps = self.m.trace[-1], index[where], np.broadcast_to(warp, index.shape)[where]
        for one in np.unique(tags >> self.bits):
            first = int(np.flatnonzero((tags >> self.bits) == one)[0])
            other = self.m.trace[int(one)]
            row, granule = divmod(int(places[first]), self.count)
            self.record(kind, here, other, row, granule, (int(tags[first]) & self.low, int(warps[first])))

    def record(self, kind: str, here: int, other: int, row: int, granule: int, pair: tuple[int, int]) -> None:
        """Add a finding about a granule of the CTA `row` between two instructions, unless they have one of its kind."""
        if (kind, here, other) in self.faults:
            return
        code = self.m.kernel.instructions
        self.faults[kind, here, other] = Fault(
            kind,
            code[here].text,
            code[other].text,
            (granule * self.granule - SHARED_BASE) // 4,
            self.warps_of(pair),
            int(self.epochs[row]),
            int(self.m.cta_numbers[row]),
            self.m.kernel.where(here),
            self.m.kernel.where(other),
            self.names_of(pair, row),
        )

    def warps_of(self, agents: tuple[int, int]) -> tuple[int, int]:
        """The warps of a pair of agents, each in its CTA."""
        return agents

    def names_of(self, agents: tuple[int, int], row: int) -> tuple[str, str]:
        """What a report calls a pair of agents; "" for a warp of the CTA that the report is about."""
        return "", ""

    def read(self, lanes: Lanes, size: int) -> None:
        """A read of `size` bytes a lane."""
        index, row, warp = self.locate(lanes, size)
        tag = self.writer[index]
        race = self._unseen(tag, row, warp)
        if race.any():
            self.report("write-read", race, tag, index, warp)
        if not tag.all():
            now = np.full(1, self.m.step << self.bits, self.tag_type)
            self.report(UNWRITTEN, (tag == 0) & (self.flight[index] == 0), now | warp, index, warp)
        if self.flying:
            tag = self.flight[index]
            if tag.any():
                self.report("read of a copy in flight", tag > 0, tag, index, warp)
        self.note_readers(index, warp)
        if self.lane_order is not None:
            self.lane_order.read(index, row, warp, lanes.thread)

    def note_readers(self, index: Array, warp: Array) -> None:
        """Remember the warps that read."""
        now = np.broadcast_to(self.tag_type(self.m.step << self.bits) | warp, index.shape)
        fresh = self.reader[index] <= self.floor
        self.reader[index[fresh]] = now[fresh]
        another = (self.reader[index] & self.low) != (now & self.low)
        if another.any():
            self.reader_too[index[another]] = now[another]

    def write(self, lanes: Lanes, size: int, differs: Callable[[], Array]) -> Array:
        """A write of `size` bytes a lane, about to happen; `differs` says how far each lane's value is from what
        memory holds: 0, 1 or 2, as :func:`apart`.

        Returns the tags' index, for `wrote`.
        """
        index, row, warp = self.locate(lanes, size)
        self._against(index, row, warp, differs)
        self.writer[index] = self.tag_type(self.m.step << self.bits) | warp
        if self.lane_order is not None:
            self.lane_order.write(index, row, warp, lanes.thread)
        return index

    def wrote(self, index: Array, lanes: Lanes, differs: Callable[[], Array]) -> None:
        """After the write: two warps that wrote one granule in the same instruction."""
        warp = self.who(lanes)
        tag = self.writer[index]
        lost = (tag & self.low) != warp
        if lost.any():
            self._written_twice(lost, differs(), tag, index, warp)

    def _written_twice(self, race: Array, differs: Array, tag: Array, index: Array, warp: Array) -> None:
        """A fault where the values differ; where they agree, or but for rounding, a note."""
        far = _per_granule(differs, index)
        for level, kind in enumerate((SAME, NEAR, "write-write")):
            self.report(kind, race & (far == level), tag, index, warp)

    def _against(self, index: Array, row: Array, warp: Array, differs: Callable[[], Array] | None) -> None:
        """Report what a write at these granules races with."""
        tag = self.writer[index]
        race = self._unseen(tag, row, warp)
        if race.any():
            if differs is None:
                self.report("write-write", race, tag, index, warp)
            else:
                self._written_twice(race, differs(), tag, index, warp)
        for tags in (self.reader[index], self.reader_too[index]):
            race = self._unseen(tags, row, warp)
            if race.any():
                self.report("read-write", race, tags, index, warp)
        if self.flying:
            tag = self.flight[index]
            if tag.any():
                self.report("write to a copy in flight", tag > 0, tag, index, warp)
        if self.m.pending_registers:
            busy = self.operands[index] > 0
            if busy.any():
                self.report("write to an operand of a pending wgmma", busy, self.operand[index], index, warp)

    def copy_issued(self, lanes: Lanes, size: int) -> tuple[Array, Array, Array]:
        """A cp.async: from now until it is waited for it may land at any time."""
        index, row, warp = self.locate(lanes, size)
        self._against(index, row, warp, None)
        self.flight[index] = self.tag_type(self.m.step << self.bits) | warp
        self.flying = True
        return index, row, warp

    def copy_landed(self, lanes: Lanes, size: int, agent: int | None) -> None:
        """A write at this step, by the warp whose thread has waited, or by an agent of which an mbarrier tells."""
        index, _, warp = self.locate(lanes, size)
        self.writer[index] = self.tag_type(self.m.step << self.bits) | (warp if agent is None else agent)
        self.flight[index] = 0

    def atomic(self, lanes: Lanes, size: int) -> None:
        """An atomic update: it races with plain accesses, not with other atomics (tagged as by warp 63)."""
        index, row, warp = self.locate(lanes, size)
        tag = self.writer[index]
        race = self._unseen(tag, row, warp) & ((tag & self.low) != self.low)
        if race.any():
            self.report("write-write", race, tag, index, warp)
        for tags in (self.reader[index], self.reader_too[index]):
            race = self._unseen(tags, row, warp)
            if race.any():
                self.report("read-write", race, tags, index, warp)
        self.writer[index] = self.m.step << self.bits | self.low

    def proxy_fence(self, mask: Array | None) -> None:
        """fence.proxy.async: what these warps have written before is visible to wgmma."""
        if mask is None:
            self.fence[:] = self.m.step
            return
        if self.m.ctas > 1:
            self._split()
        warps = np.any(np.broadcast_to(mask, self.m.shape).reshape(self.m.ctas, self.m.warps, 32), axis=2)
        self.fence[warps[: self.rows]] = self.m.step

    def note(self, kind: str, here: int, other: int, cta: int = 0) -> None:
        """Record a fault about registers."""
        if (kind, here, other) not in self.faults:
            code = self.m.kernel.instructions
            at = (int(self.epochs[cta]), int(self.m.cta_numbers[cta]))
            lines = (self.m.kernel.where(here), self.m.kernel.where(other))
            self.faults[kind, here, other] = Fault(kind, code[here].text, code[other].text, -1, (-1, -1), *at, *lines)

    def operand_read(self, chunks: Array, groups: Array, common: bool, regions: list[Region]) -> None:
        """A wgmma of the warpgroups `groups`, [CTAs, warpgroups], begins to read 16-byte chunks and is not waited for
        yet.

        Adds what it reads to `regions`, for `operands_done`.
        """
        base = (chunks[:, None] // self.granule + np.arange(16 // self.granule)).reshape(-1)
        if not common:
            self._split()
        for group in np.flatnonzero(groups.any(0)):
            ctas = None if common else np.flatnonzero(groups[:, group])
            rows = self._rows(ctas)
            self._operand(base + rows * self.count, rows, int(group))
            regions.append((base, int(group), ctas))

    def _rows(self, ctas: Array | None) -> Array:
        """Row numbers, [R, 1], of some CTAs, or of all."""
        return (np.arange(self.rows) if ctas is None else ctas)[:, None]

    def _operand(self, index: Array, row: Array, group: int) -> None:
        tag = self.writer[index]
        first = self.leader(row, group)
        for warp in range(4):
            race = self._unseen(tag, row, first + warp)
            if race.any():
                self.report("write-read by wgmma", race, tag, index, first + warp)
                break
        if self.flying:
            flight = self.flight[index]
            if flight.any():
                self.report("wgmma reads a copy in flight", flight > 0, flight, index, first)
        stale = self.unfenced(tag, row, first, 4)
        if stale.any():
            self.report("wgmma reads a write without fence.proxy.async", stale, tag, index, first)
        self.operand[index] = self.tag_type(self.m.step << self.bits) | first
        self.operands[index] += 1

    def unfenced(self, tag: Array, row: Array, first: Array, warps: int) -> Array:
        """Where the write with `tag` has seen no fence.proxy.async: neither by its own warp since, nor by one of those
        that read it through the async proxy."""
        fences = self.fence[row, np.minimum(tag & self.low, self.fence.shape[1] - 1)]
        for warp in range(warps):
            fences = np.maximum(fences, self.fence[row, first + warp])
        return (tag >> self.bits) > fences

    def operands_done(self, regions: list[Region], done: Array) -> None:
        """The warpgroups `done`, [CTAs, warpgroups], have waited for a product: its operands may be written after a
        barrier."""
        for base, group, ctas in regions:
            finished = done[:, group] if ctas is None else done[ctas, group]
            if not finished.any():
                continue
            if ctas is None and not finished.all():
                self._split()
            rows = self._rows(ctas)
            if not finished.all():
                rows = rows[finished]
            index = base + rows * self.count
            self.operands[index] -= 1
            self.operands_were_read(index, rows, group)

    def operands_were_read(self, index: Array, rows: Array, group: int) -> None:
        """A warpgroup has read these granules."""
        for warp in range(4):
            self.note_readers(index, self.leader(rows, group) + warp)

    def barrier_all(self) -> None:
        """Every live thread of every CTA has passed a barrier."""
        self.epochs += 1
        self.seen[:] = self.m.step
        self.floor = self.m.step << self.bits | self.low

    def clock(self, cta: int, warp: int) -> Array:
        """What a warp of a CTA has seen by now, and done itself: all that its arrival at a barrier tells of."""
        if self.m.ctas > 1:
            self._split()
        clock: Array = self.seen[cta if self.rows > 1 else 0, warp].copy()
        clock[warp] = self.m.step
        return clock

    def barrier(self, cta: int, came: Array, waited: Array, before: Sequence[Array] = ()) -> None:
        """In one CTA the warps `came` have come to a barrier at which the warps `waited` wait. before: the clocks of
        those that arrived and went on."""
        self.epochs[cta] += 1
        clocks = [*(self.clock(cta, int(warp)) for warp in np.flatnonzero(came)), *before]
        row = cta if self.rows > 1 else 0
        self.seen[row, waited] = np.maximum(self.seen[row, waited], np.max(clocks, axis=0))
        self.floor = (
            int(self.seen.min()) << self.bits | self.low if self.m.warps > 1 else self.m.step << self.bits | self.low
        )


def _per_granule(changed: Array, index: Array) -> Array:
    """A number per lane, [CTAs, n] or [n], as one that broadcasts with the granule index [R, n, k]."""
    changed = changed.reshape(-1, index.shape[1])
    if changed.shape[0] != index.shape[0]:
        changed = np.max(changed, axis=0, keepdims=True)
    return changed[:, :, None]
