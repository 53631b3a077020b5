"""Clusters: whose shared memory an address means, accesses to a peer's, and the barrier of a cluster.

Source: PTX ISA, "mapa", "getctarank", "barrier.cluster", "ld", "st", "atom", "red" with `.shared::cluster`. A shared
address that mapa made has the rank of its CTA, plus one, above RANK_SHIFT; one without a rank means the own CTA.
"""

from dataclasses import dataclass

import numpy as np

from ptx_emulator.core.clocks import ClusterChecker, merged
from ptx_emulator.core.decode import Action, Decoder, Modifiers, instruction, wait
from ptx_emulator.core.errors import Divergence, EmulationError, MemoryFault, Unsupported
from ptx_emulator.core.shared import Lanes
from ptx_emulator.core.spaces import RANK_SHIFT, SHARED_WINDOW, UNSIGNED, Array
from ptx_emulator.core.state import Part, State, Wait
from ptx_emulator.core.syntax import TYPE_BYTES, Instruction

OWN = (1 << RANK_SHIFT) - 1


def owner_of(m: State, cta: int, address: int, text: str, *, remote: bool) -> tuple[int, int]:
    """(CTA, address in its memory) that a shared address means to a thread of `cta`. remote: it may be a peer's."""
    rank = address >> RANK_SHIFT
    if not rank:
        return cta, address
    if rank > m.cluster:
        raise MemoryFault(f"an address of rank {rank - 1} in a cluster of {m.cluster}: {text}")
    owner = cta // m.cluster * m.cluster + rank - 1
    if owner != cta and not remote:
        raise MemoryFault(f"an address of the CTA of rank {rank - 1} where the own CTA's is meant: {text}")
    return owner, address & OWN


def touch(m: State, owner: int, cta: int, agent: int, text: str) -> None:
    """A thread of `cta` reaches into the memory of `owner`, which must still be there and stay until it is told."""
    if owner == cta:
        return
    if not m.live[owner].any():
        raise MemoryFault(f"shared memory of CTA {int(m.cta_numbers[owner])}, which has ended: {text}")
    if isinstance(m.checker, ClusterChecker):
        m.checker.remote[owner, agent] = m.step


def remote_lanes(m: State, address: Array, mask: Array | None, size: int, text: str) -> tuple[Lanes, Array]:
    """The active lanes of an access to the cluster's shared memory, by the CTAs that own it, and their flat numbers."""
    chosen = np.flatnonzero(np.broadcast_to(True if mask is None else mask, m.shape))
    wide = np.broadcast_to(address, m.shape).reshape(-1)[chosen]
    cta, thread = chosen // m.threads, chosen % m.threads
    rank = wide >> RANK_SHIFT
    if int(rank.max(initial=0)) > m.cluster:
        raise MemoryFault(f"an address of rank {int(rank.max()) - 1} in a cluster of {m.cluster}: {text}")
    owner = np.where(rank > 0, cta // m.cluster * m.cluster + rank - 1, cta)
    local = wide & OWN
    m.shared.check(local, size, size, text)
    agent = cta % m.cluster * m.warps + thread // 32
    for one, by, who in np.unique(np.stack([owner, cta, agent]), axis=1).T.tolist():
        touch(m, one, by, who, text)
    return Lanes(False, local, thread, owner, False, agent), chosen


def put(m: State, register: int, chosen: Array, value: Array) -> None:
    """Write one value a chosen lane to a register."""
    whole = np.array(np.broadcast_to(m.r[register], m.shape))
    whole.reshape(-1)[chosen] = value
    m.r[register] = whole


def _address_kind(ins: Instruction) -> tuple[str, int]:
    """(type, where its window begins) of the shared address that an instruction takes; 0 for one in shared memory."""
    mods = Modifiers(ins)
    window = 0 if mods.take("shared::cluster") else SHARED_WINDOW
    types = mods.types()
    mods.end()
    if types not in (["u32"], ["u64"]) or (types == ["u32"] and window):
        raise Unsupported(f"unsupported: {ins.text}")
    return types[0], window


@instruction("mapa")
def build_map_address(d: Decoder, ins: Instruction) -> Action | None:
    """The same place in the memory of another CTA of the cluster."""
    kind, window = _address_kind(ins)
    text = ins.text
    out, source = d.destination(ins.operands[0], kind, ins), d.source(ins.operands[1], kind, ins)
    rank = d.source(ins.operands[2], "u32", ins)
    unsigned = UNSIGNED[TYPE_BYTES[kind]]

    def act(m: State, mask: Array | None) -> None:
        ranks = m.r[rank].astype(np.int64)
        asked = ranks if mask is None else np.where(mask, ranks, 0)
        if int(asked.max()) >= m.cluster:
            raise EmulationError(f"rank {int(asked.max())} in a cluster of {m.cluster}: {text}")
        local = (m.r[source].astype(np.int64) - window) & OWN
        m.set(out, (window + ((ranks + 1) << RANK_SHIFT) + local).astype(unsigned), mask)

    return act


@instruction("getctarank")
def build_rank_of(d: Decoder, ins: Instruction) -> Action | None:
    """The rank of the CTA that owns an address."""
    kind, window = _address_kind(ins)
    out, source = d.destination(ins.operands[0], "u32", ins), d.source(ins.operands[1], kind, ins)

    def act(m: State, mask: Array | None) -> None:
        rank = ((m.r[source].astype(np.int64) - window) >> RANK_SHIFT) - 1
        own = (np.arange(m.ctas) % m.cluster)[:, None]
        m.set(out, np.where(rank < 0, own, rank).astype(np.uint32), mask)

    return act


class ClusterBarriers(Part):
    """The barrier of each cluster of a batch: phases that have ended, and the phase whose end each thread waits for."""

    def __init__(self, m: State) -> None:
        self.phase: Array = np.zeros(m.ctas // m.cluster, np.int64)
        self.target: Array = np.zeros(m.shape, np.int64)
        self.owes: Array = np.zeros(m.shape, bool)  # has arrived and not waited
        self.asleep: Array = np.zeros(m.shape, bool)
        self.aligned_at: Array = np.full(m.shape, -1, np.int32)  # the aligned instruction by which a lane arrived
        self.arriving: dict[int, Array] = {}  # clocks, by cluster
        self.released: dict[int, Array] = {}
        self.inits: dict[int, Array] = {}  # fenced inits of mbarriers that those who arrived know, by cluster

    def open(self, m: State) -> Array:
        """Lanes that have arrived in a phase that has not ended."""
        return self.target > np.repeat(self.phase, m.cluster)[:, None]

    def arrive(self, m: State, lanes: Array, releases: bool, aligned_at: int, text: str) -> None:
        """The lanes arrive; aligned_at: the number of the instruction where it is an aligned one, else -1."""
        self.aligned_at[lanes] = aligned_at
        if (self.owes & lanes).any():
            raise EmulationError(f"threads arrive again before they wait: {text}")
        self.owes |= lanes
        self.target = np.where(lanes, np.repeat(self.phase, m.cluster)[:, None] + 1, self.target)
        if isinstance(m.checker, ClusterChecker):
            for cta, warp in np.argwhere(lanes.reshape(m.ctas, m.warps, 32).any(2)).tolist():
                cluster, agent = cta // m.cluster, m.agent(cta, 32 * warp)
                release = m.checker.release_of(cluster, agent, "cluster", not releases)
                if release is not None and release[1] != "cta":
                    self.arriving[cluster] = merged(self.arriving.get(cluster), release[0])
                self.inits[cluster] = merged(self.inits.get(cluster), m.checker.inits[cluster, agent])

    def settle(self, m: State) -> None:
        """End the phase of each cluster whose live threads have all arrived, and wake those that wait for it."""
        here = self.open(m)
        if not here.any():
            return
        rows = (len(self.phase), -1)
        done = (here | ~m.live).reshape(rows).all(1) & here.reshape(rows).any(1)
        if not done.any():
            return
        self._check_aligned(m, np.repeat(done, m.cluster)[:, None] & here)
        self.phase += done
        m.progress += 1
        for cluster in np.flatnonzero(done).tolist():
            self.released.pop(cluster, None)
            if cluster in self.arriving:
                self.released[cluster] = self.arriving.pop(cluster)
        wakes = self.asleep & ~self.open(m)
        self.acquire(m, wakes)
        m.wake(wakes)
        self.asleep &= ~wakes

    def _check_aligned(self, m: State, here: Array) -> None:
        """All threads of a warp must arrive by one instruction if it is an aligned one."""
        by, arrived = self.aligned_at.reshape(-1, 32), here.reshape(-1, 32)
        first = np.take_along_axis(by, arrived.argmax(1)[:, None], axis=1)
        if (arrived & (by != first)).any():
            number = int(by[arrived & (by != first)].max(initial=int(first.max())))
            text = m.kernel.instructions[number].text
            raise Divergence(f"reached by some lanes of a warp only, the others arrived elsewhere: {text}").located(
                m.kernel.where(number)
            )

    def acquire(self, m: State, lanes: Array) -> None:
        """The lanes have seen the phase end."""
        if not isinstance(m.checker, ClusterChecker):
            return
        for cta, warp in np.argwhere(lanes.reshape(m.ctas, m.warps, 32).any(2)).tolist():
            cluster, agent = cta // m.cluster, m.agent(cta, 32 * warp)
            if cluster in self.released:
                m.checker.acquire(cluster, agent, self.released[cluster])
            known = m.checker.inits[cluster, agent]
            np.maximum(known, self.inits[cluster], out=known)


def _read(ins: Instruction, kind: str, order: str) -> tuple[bool, bool]:
    """(whether it is aligned, whether it is relaxed)."""
    mods = Modifiers(ins)
    mods.take("cluster")
    mods.take(kind)
    relaxed = kind == "arrive" and mods.take("relaxed") is not None
    mods.take(order)
    aligned = mods.take("aligned") is not None
    mods.end()
    return aligned, relaxed


@instruction("barrier")
def build_cluster_arrive(d: Decoder, ins: Instruction) -> Action | None:
    if ins.modifiers[:2] != ("cluster", "arrive"):
        raise Unsupported(f"unsupported: {ins.text}")
    aligned, relaxed = _read(ins, "arrive", "release")
    text, number = ins.text, d.current

    def arrive(m: State, mask: Array | None) -> None:
        lanes = np.array(np.broadcast_to(m.live if mask is None else mask, m.shape))
        m.tick(number)
        m.of(ClusterBarriers).arrive(m, lanes, not relaxed, number if aligned else -1, text)

    return arrive


@dataclass
class ClusterWait(Wait):
    """`barrier.cluster.wait`."""

    def enter(self, m: State, lanes: Array) -> Array:
        """Sleep until all live threads of the cluster have arrived."""
        state = m.of(ClusterBarriers)
        if (lanes & ~state.owes).any():
            raise EmulationError(f"threads wait that have not arrived: {self.text}")
        state.owes &= ~lanes
        sleeps = lanes & state.open(m)
        state.acquire(m, lanes & ~sleeps)
        state.asleep |= sleeps
        return sleeps

    def tell(self, m: State, lanes: Array) -> str:
        """Who sleeps, for a report of a deadlock."""
        cluster = int(np.flatnonzero(lanes.any(1))[0]) // m.cluster
        rows = slice(cluster * m.cluster, (cluster + 1) * m.cluster)
        missing = m.live[rows] & ~m.of(ClusterBarriers).open(m)[rows]
        return (
            f"in `{self.text}` {int(lanes[rows].sum())} threads of the cluster of CTA "
            f"{int(m.cta_numbers[rows.start])} wait for {int(missing.sum())} live threads that have not arrived"
        )


@wait("barrier")
def build_cluster_wait(d: Decoder, ins: Instruction) -> ClusterWait | None:
    if ins.modifiers[:2] != ("cluster", "wait"):
        return None
    _read(ins, "wait", "acquire")
    return ClusterWait(d.current, ins.text)
