"""The checker of kernels with clusters, mbarriers or bulk copies: a vector clock for every warp of a cluster.

An agent is a warp of the cluster, number rank * warps + warp; after these the products of a warpgroup, whose reads any
warp of it has waited for; after these the async proxy as it signals one mbarrier: copies that different mbarriers
report are not ordered with each other. `seen[cluster, warp, agent]` is the last step of the agent
that is visible to the warp. An arrival releases the warp's clock, a wait that succeeds acquires what was released;
so a race is found in whatever order the emulator ran the two.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx_emulator.core.batch import Batch
from ptx_emulator.core.checks import Checker
from ptx_emulator.core.shared import Lanes
from ptx_emulator.core.spaces import Array

COLUMNS = 32  # agents of the async proxy that are added at a time


def merged(first: Array | None, second: Array) -> Array:
    """The later of two clocks, agent by agent; one may have been made when there were fewer agents."""
    if first is None:
        return second
    if len(first) < len(second):
        first, second = second, first
    out = first.copy()
    out[: len(second)] = np.maximum(out[: len(second)], second)
    return out


class ClusterChecker(Checker):
    """Race bookkeeping of a batch of whole clusters, a row of tags for each CTA."""

    bits = 11
    low = 2047
    tag_type: Any = np.int64

    def __init__(self, machine: Batch, granule: int) -> None:
        super().__init__(machine, granule)
        self.size: int = machine.cluster
        warps = self.size * machine.warps
        self.groups: int = -(-machine.warps // 4)
        self.agents: int = warps + self.size * self.groups
        clusters = machine.ctas // self.size
        self._split()
        self.seen: Array = np.zeros((clusters, warps, self.agents), np.int64)
        self.fence: Array = np.zeros((clusters, warps), np.int64)
        self.pins: Array = np.zeros(len(self.writer), np.int16)  # bulk copies that still read a granule
        self.pinned: Array = np.zeros(len(self.writer), np.int64)
        self.remote: Array = np.zeros((machine.ctas, warps), np.int64)  # last step an agent touched a peer's memory
        self.inits: Array = np.zeros((clusters, warps, warps), np.int64)  # fences behind inits that a warp knows
        self.fenced: dict[tuple[int, int], tuple[Array, str]] = {}  # a warp's clock at its last fence, and its scope
        self.owed: dict[tuple[int, int], Array] = {}  # what relaxed waits have seen: the next fence acquires it
        self.updated: Array = np.zeros(len(self.writer), bool)  # whose last write was an atomic update
        self.taken: Array = np.zeros(len(self.writer), np.int64)  # by an mbarrier: the tag of its init

    def last_meeting(self, row: Array, warp: Array) -> Array:
        """The step at which the lanes of an agent, a warp of the cluster, last met."""
        met: Array = self.seen[row // self.size, warp, warp]
        return met

    def agent(self, cta: int, thread: int) -> int:
        """The number of a thread's warp in its cluster."""
        return cta % self.size * self.m.warps + thread // 32

    def new_agent(self) -> int:
        """A number for the async proxy at one more mbarrier of every cluster."""
        number = self.agents
        self.agents += 1
        if self.agents > self.seen.shape[2]:
            self.seen = np.concatenate([self.seen, np.zeros((*self.seen.shape[:2], COLUMNS), np.int64)], axis=2)
        return number

    def who(self, lanes: Lanes) -> Array:
        """The agent that each lane is, [R, n, 1]."""
        if lanes.agent is not None:
            return lanes.agent[None, :, None]
        warp = lanes.thread >> 5
        if lanes.cta is not None:
            return (lanes.cta % self.size * self.m.warps + warp)[None, :, None]
        return (np.arange(self.rows) % self.size * self.m.warps)[:, None, None] + warp[None, :, None]

    def leader(self, row: Array, group: int) -> Array:
        """The first warp of a warpgroup of each CTA."""
        return row % self.size * self.m.warps + 4 * group

    def _unseen(self, tag: Array, row: Array, warp: Array) -> Array:
        """Where an access with `tag` is another agent's and not ordered before what `warp` does now."""
        other = tag & self.low
        unseen = (tag > 0) & (other != warp)
        if unseen.any():
            unseen &= (tag >> self.bits) > self.seen[row // self.size, warp, other]
        return unseen

    def write(self, lanes: Lanes, size: int, differs: Callable[[], Array]) -> Array:
        """A write of `size` bytes a lane, about to happen."""
        index = super().write(lanes, size, differs)
        self.updated[index] = False
        self._mbarriers(index, self.who(lanes))
        return index

    def take(self, cta: int, address: int, size: int, agent: int | None) -> None:
        """An mbarrier begins to be at an address, by this agent's init; None: it is no more."""
        tag = 0 if agent is None else self.m.step << self.bits | agent
        self.taken[self.cells(cta, np.array([address]), size)] = tag

    def _mbarriers(self, index: Array, agent: Array) -> None:
        """Report a write to the bytes of an mbarrier, which are its own until it is invalidated."""
        tag = self.taken[index]
        if tag.any():
            self.report("write over an mbarrier", tag > 0, tag, index, agent)

    def atomic(self, lanes: Lanes, size: int) -> None:
        """An atomic update: it races with plain accesses, not with other atomics. The last one's agent is kept."""
        index, row, agent = self.locate(lanes, size)
        tag = self.writer[index]
        for kind, tags, free in (
            ("write-write", tag, self.updated[index]),
            ("read-write", self.reader[index], False),
            ("read-write", self.reader_too[index], False),
        ):
            race = self._unseen(tags, row, agent) & ~np.asarray(free)
            if race.any():
                self.report(kind, race, tags, index, agent)
        self._mbarriers(index, agent)
        self.writer[index] = self.m.step << self.bits | agent
        self.updated[index] = True

    def _against(self, index: Array, row: Array, warp: Array, differs: Any) -> None:
        super()._against(index, row, warp, differs)
        busy = self.pins[index] > 0
        if busy.any():
            self.report("write to the source of a bulk copy", busy, self.pinned[index], index, warp)

    def unfenced(self, tag: Array, row: Array, first: Array, warps: int) -> Array:
        """Where a generic write has seen no fence to the async proxy."""
        other = tag & self.low
        cluster = row // self.size
        fences = self.fence[cluster, np.minimum(other, self.fence.shape[1] - 1)]
        for warp in range(warps):
            fences = np.maximum(fences, self.fence[cluster, first + warp])
        return (other < self.fence.shape[1]) & ((tag >> self.bits) > fences)

    def operands_were_read(self, index: Array, rows: Array, group: int) -> None:
        """A warpgroup has waited for its product: each of its warps knows that all of the operands were read."""
        products = self.size * self.m.warps + rows % self.size * self.groups + group
        self.note_readers(index, products)
        for warp in range(4):
            self.seen[rows // self.size, self.leader(rows, group) + warp, products] = self.m.step

    def proxy_fence(self, mask: Array | None) -> None:
        """fence.proxy.async by some warps."""
        for cluster, agent in self._warps(mask):
            self.fence[cluster, agent] = self.m.step

    def barrier_all(self) -> None:
        """Every live thread of every CTA has passed a barrier of its CTA."""
        for cta in range(self.m.ctas):
            everyone = np.ones(self.m.warps, bool)
            self.barrier(cta, everyone, everyone)

    def clock(self, cta: int, warp: int) -> Array:
        """What a warp of a CTA has seen by now, and done itself."""
        return self.released(cta // self.size, cta % self.size * self.m.warps + warp)

    def barrier(self, cta: int, came: Array, waited: Array, before: Sequence[Array] = ()) -> None:
        """In one CTA the warps `came` have come to a barrier at which the warps `waited` wait. before: the clocks of
        those that arrived and went on."""
        self.epochs[cta] += 1
        cluster, first = cta // self.size, cta % self.size * self.m.warps
        came, waited = first + np.flatnonzero(came), first + np.flatnonzero(waited)
        known = self.seen[cluster, came].max(0)
        known[came] = self.m.step
        for clock in before:
            known = merged(known, clock)
        self.seen[cluster, waited] = np.maximum(self.seen[cluster, waited], known)

    def released(self, cluster: int, agent: int) -> Array:
        """The clock of a warp, with its own step: what a release hands on."""
        clock = self.seen[cluster, agent].copy()
        clock[agent] = self.m.step
        return clock

    def acquire(self, cluster: int, agent: int, clock: Array) -> None:
        """What was released with `clock` is visible to the warp."""
        mine = self.seen[cluster, agent, : len(clock)]
        np.maximum(mine, clock, out=mine)

    def lanes_met(self, warps: Array) -> None:
        """The lanes of these warps, [CTAs, warps], have met: each knows what the others did."""
        for cta, warp in np.argwhere(warps):
            agent = cta % self.size * self.m.warps + warp
            self.seen[cta // self.size, agent, agent] = self.m.step

    def lane_changes(self, cta: int, cells: Array, agent: int) -> None:
        """One lane changes granules: what several lanes of its warp wrote there, they must have met since.

        More than 16 bytes by one instruction were several lanes' doing. A warp's own column of `seen` has its last
        meeting.
        """
        tag, who = self.writer[cells], np.array([[agent]])
        step = tag >> self.bits
        unmet = ((tag & self.low) == agent) & (step > self.seen[cta // self.size, agent, agent])
        for one in np.unique(step[unmet]):
            where = unmet & (step == one)
            alone = self.m.kernel.instructions[self.m.trace[int(one)]].root == "tensormap"
            if where.sum() * self.granule > 16 and not alone:
                self.report("write by other lanes of the warp, which have not met", where, tag, cells, who)

    def visible(self, cluster: int, agent: int, step: int, by: int) -> bool:
        """Whether the warp has seen what agent `by` did at `step`."""
        return agent == by or int(max(self.seen[cluster, agent, by], self.inits[cluster, agent, by])) >= step

    def _warps(self, mask: Array | None) -> list[tuple[int, int]]:
        """(cluster, agent) of each warp with an active lane."""
        warps = np.broadcast_to(True if mask is None else mask, self.m.shape).reshape(*self.fence.shape, 32).any(2)
        return [(int(cluster), int(agent)) for cluster, agent in np.argwhere(warps)]

    def memory_fence(self, mask: Array | None, scope: str) -> None:
        """What relaxed waits have seen is acquired; a relaxed arrival after it releases what came before."""
        for cluster, agent in self._warps(mask):
            owed = self.owed.pop((cluster, agent), None)
            if owed is not None:
                self.acquire(cluster, agent, owed)
            self.fenced[cluster, agent] = self.released(cluster, agent), scope

    def init_fence(self, mask: Array | None) -> None:
        """fence.mbarrier_init: a barrier of the cluster, even a relaxed one, then makes the inits visible."""
        for cluster, agent in self._warps(mask):
            self.inits[cluster, agent, agent] = self.m.step

    def release_of(self, cluster: int, agent: int, scope: str, relaxed: bool) -> tuple[Array, str] | None:
        """(clock, scope) that an arrival releases: by itself, or by a fence before it; None: nothing."""
        if not relaxed:
            return self.released(cluster, agent), scope
        found = self.fenced.get((cluster, agent))
        return found if found is None or scope != "cta" else (found[0], "cta")

    def warps_of(self, agents: tuple[int, int]) -> tuple[int, int]:
        """Each warp's number in its CTA; -1 for the async proxy."""
        first, second = (a % self.m.warps if a < self.size * self.m.warps else -1 for a in agents)
        return first, second

    def names_of(self, agents: tuple[int, int], row: int) -> tuple[str, str]:
        """Warps of other CTAs and the async proxy, in words."""
        names = []
        for agent in agents:
            rank, warp = divmod(agent, self.m.warps)
            if agent >= self.size * (self.m.warps + self.groups):
                names.append("the async proxy")
            elif rank >= self.size:
                place = agent - self.size * self.m.warps
                names.append(f"a wgmma of warpgroup {place % self.groups}")
            elif rank != row % self.size:
                names.append(f"warp {warp} of CTA {int(self.m.cta_numbers[row // self.size * self.size + rank])}")
            else:
                names.append("")
        return names[0], names[1]

    # ---- bulk copies ----

    def cells(self, cta: int, address: Array, width: int) -> Array:
        """The granules of the aligned `width` bytes around each address in a CTA's shared memory, [1, n]."""
        places = np.sort(address // width)
        places = places[np.append(True, places[1:] != places[:-1])]  # `np.unique` takes ten times as long for a few
        many = width // self.granule
        return (places[:, None] * many + np.arange(many)).reshape(1, -1) + cta * self.count

    def bulk_write(self, cta: int, cells: Array, agent: int, kind: str, fenced: bool) -> None:
        """A copy into these granules begins: it may land from now on. fenced: it goes through the async proxy."""
        row, who = np.array([[cta]]), np.array([[agent]])
        self._against(cells, row, who, None)
        self._mbarriers(cells, who)
        if fenced:
            tag = self.writer[cells]
            stale = self.unfenced(tag, row, who, 1)
            if stale.any():
                self.report(f"{kind} over a write without fence.proxy.async", stale, tag, cells, who)
        self.flight[cells] = self.m.step << self.bits | agent
        self.flying = True

    def bulk_landed(self, cells: Array, agent: int) -> None:
        """The copy has landed; `agent` is the async proxy at the mbarrier that tells so."""
        self.writer[cells] = self.m.step << self.bits | agent
        self.updated[cells] = False
        self.flight[cells] = 0

    def bulk_read(self, cta: int, cells: Array, agent: int) -> None:
        """A bulk copy that the warp issues begins to read these granules: they are its until it is waited for."""
        row, who = np.array([[cta]]), np.array([[agent]])
        tag = self.writer[cells]
        race = self._unseen(tag, row, who)
        if race.any():
            self.report("write-read by a bulk copy", race, tag, cells, who)
        stale = self.unfenced(tag, row, who, 1)
        if stale.any():
            self.report("bulk copy reads a write without fence.proxy.async", stale, tag, cells, who)
        flight = self.flight[cells]
        if flight.any():
            self.report("bulk copy reads a copy in flight", flight > 0, flight, cells, who)
        self.pins[cells] += 1
        self.pinned[cells] = self.m.step << self.bits | agent

    def bulk_was_read(self, cells: Array, agent: int) -> None:
        """The agent knows that the source has been read."""
        self.pins[cells] -= 1
        self.note_readers(cells, np.array([[agent]]))
