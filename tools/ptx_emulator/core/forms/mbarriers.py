"""mbarriers: objects in shared memory that count arrivals and bytes, and the waits for their phases.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier". A phase ends when no arrival is
pending and the bytes that were expected have come. A lane whose wait must fail sleeps; `test_wait` lets it go on, but
behind all others. An mbarrier lies in the CTA's memory only as an address: its state is kept here.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx_emulator.core.clocks import ClusterChecker, merged
from ptx_emulator.core.decode import Action, Decoder, Modifiers, instruction, wait
from ptx_emulator.core.errors import EmulationError, MemoryFault, Misaligned, Unsupported
from ptx_emulator.core.forms.clusters import owner_of, touch
from ptx_emulator.core.forms.loads import effective
from ptx_emulator.core.spaces import SHARED_BASE, SHARED_WINDOW, Array
from ptx_emulator.core.state import Part, State, Wait
from ptx_emulator.core.syntax import Instruction, Sink

BYTES = 8
MOST_ARRIVALS = (1 << 20) - 1
SCOPES = ("cta", "cluster", "gpu", "sys")


@dataclass
class Release:
    """What arrivals hand to those who wait: clocks by how far they reach, for the own CTA or for the cluster."""

    cta: Array | None = None
    cluster: Array | None = None

    def add(self, clock: Array, own: bool, scope: str) -> None:
        """A release by a warp of the barrier's own CTA, or of another; a narrow scope does not reach across CTAs."""
        if own:
            self.cta = merged(self.cta, clock)
        if scope != "cta":
            self.cluster = merged(self.cluster, clock)

    def reaches(self, scope: str) -> Array | None:
        """The clock that a wait of this scope acquires."""
        if scope == "cta" or self.cluster is None:
            return self.cta
        return self.cluster if self.cta is None else merged(self.cta, self.cluster)


@dataclass
class Sleeper:
    """Lanes that sleep at a barrier until the phase they wait for has ended. lanes: flat numbers."""

    end: "PhaseWait"
    lanes: Array
    token: int


@dataclass
class MBarrier:
    """One mbarrier: `count` arrivals a phase, of which `pending` and `tx` bytes are outstanding in phase `phase`."""

    cta: int
    address: int
    count: int
    pending: int
    agent: int  # the async proxy's number at it
    step: int  # of its init, by the warp `by`
    by: int
    tx: int = 0
    phase: int = 0
    landed: int = 0  # the step of the last landing that it was told of
    arriving: Release = field(default_factory=Release)
    released: Release = field(default_factory=Release)
    sleepers: list[Sleeper] = field(default_factory=list)

    def state(self) -> str:
        """What is outstanding, for a report."""
        return f"phase {self.phase}, {self.pending} of {self.count} arrivals and {self.tx} bytes outstanding"


class MBarriers(Part):
    """The mbarriers of a batch, by CTA and address."""

    def __init__(self, m: State) -> None:
        self.m = m
        self.all: dict[tuple[int, int], MBarrier] = {}
        self.agents: dict[tuple[int, int], int] = {}

    @property
    def checker(self) -> ClusterChecker | None:
        """The batch's checker, which knows clocks wherever there are mbarriers."""
        checker = self.m.checker
        return checker if isinstance(checker, ClusterChecker) else None

    def init(self, cta: int, address: int, count: int, thread: int, text: str) -> None:
        """A thread makes an mbarrier of these eight bytes."""
        if address % BYTES:
            raise Misaligned(f"mbarrier at shared byte {address - SHARED_BASE}, no multiple of {BYTES}: {text}")
        if not 1 <= count <= MOST_ARRIVALS:
            raise EmulationError(f"an mbarrier takes 1 to {MOST_ARRIVALS} arrivals, not {count}: {text}")
        known = self.all.get((cta, address))
        if known is not None and known.sleepers:
            raise EmulationError(f"init of {self.name(known)}, at which threads wait: {text}")
        checker, agent = self.checker, 0
        if checker is not None:
            key = (cta % self.m.cluster, address)  # one number for all clusters
            if key not in self.agents:
                self.agents[key] = checker.new_agent()
            agent = self.agents[key]
        by = 0 if checker is None else checker.agent(cta, thread)
        if checker is not None:
            checker.take(cta, address, BYTES, by)
        self.all[cta, address] = MBarrier(cta, address, count, count, agent, self.m.step, by)

    def end(self, cta: int, address: int) -> None:
        """The mbarrier there is no more."""
        del self.all[cta, address]
        if self.checker is not None:
            self.checker.take(cta, address, BYTES, None)

    def name(self, b: MBarrier) -> str:
        """What reports call it."""
        return f"the mbarrier at shared byte {b.address - SHARED_BASE} of CTA {int(self.m.cta_numbers[b.cta])}"

    def find(self, cta: int, address: int, who: int, text: str, *, check: bool = True) -> MBarrier:
        """The mbarrier at an address of a CTA's memory, as agent `who` uses it. check: that its init is visible."""
        b = self.all.get((cta, address))
        if b is None:
            raise MemoryFault(
                f"no mbarrier was initialised at shared byte {address - SHARED_BASE} of CTA "
                f"{int(self.m.cta_numbers[cta])}: {text}"
            )
        checker = self.checker
        if check and checker is not None and not checker.visible(cta // self.m.cluster, who, b.step, b.by):
            checker.note("mbarrier used before its init is visible", self.m.trace[-1], self.m.trace[b.step], cta)
        return b

    def arrive(self, b: MBarrier, count: int, text: str) -> None:
        """`count` arrivals of the current phase."""
        if count > b.pending:
            raise EmulationError(f"more arrivals than the phase expects at {self.name(b)}, {b.state()}: {text}")
        b.pending -= count
        self.advance(b)

    def expect(self, b: MBarrier, tx: int, text: str) -> None:
        """Change the bytes outstanding; negative: they have come."""
        b.tx += tx
        if abs(b.tx) > MOST_ARRIVALS:
            raise EmulationError(f"{b.tx} bytes outstanding, beyond {MOST_ARRIVALS}, at {self.name(b)}: {text}")

    def landed(self, b: MBarrier, size: int, text: str) -> None:
        """A copy of `size` bytes has landed, at the step under way."""
        b.landed = self.m.step
        if self.checker is not None:
            clock = np.zeros(b.agent + 1, np.int64)
            clock[b.agent] = self.m.step
            b.arriving.add(clock, True, "cluster")
        self.expect(b, -size, text)
        self.advance(b)

    def advance(self, b: MBarrier) -> None:
        """End the phase if nothing is outstanding, and wake those who wait for that."""
        if b.pending or b.tx:
            return
        b.phase += 1
        b.pending = b.count
        for scope in ("cta", "cluster"):
            clock = getattr(b.arriving, scope)
            if clock is not None:
                setattr(b.released, scope, merged(getattr(b.released, scope), clock))
        b.arriving = Release()
        self.m.progress += 1
        sleepers, b.sleepers = b.sleepers, []
        for sleeper in sleepers:
            if not sleeper.end.passed(b, sleeper.token):
                b.sleepers.append(sleeper)
                continue
            lanes = np.zeros(self.m.lanes, bool)
            lanes[sleeper.lanes] = True
            self.m.wake(lanes.reshape(self.m.shape))
            self.acquire(b, sleeper.lanes, sleeper.end)

    def give_up(self) -> bool:
        """Let every `try_wait` that sleeps say that its phase is not over; whether there is one."""
        sleepers = [(b, sleeper) for b in self.all.values() for sleeper in b.sleepers]
        for b, sleeper in sleepers:
            b.sleepers = []
            lanes = np.zeros(self.m.lanes, bool)
            lanes[sleeper.lanes] = True
            self.m.set(sleeper.end.out, np.zeros(self.m.shape, bool), lanes.reshape(self.m.shape))
            self.m.wake(lanes.reshape(self.m.shape))
        return bool(sleepers)

    def acquire(self, b: MBarrier, lanes: Array, end: "PhaseWait") -> None:
        """Lanes, by their flat numbers, have seen a phase end."""
        clock = b.released.reaches(end.scope)
        if self.checker is None or clock is None:
            return
        for warp in np.unique(lanes // 32):
            cta, thread = divmod(32 * int(warp), self.m.threads)
            key = cta // self.m.cluster, self.checker.agent(cta, thread)
            if end.relaxed:
                self.checker.owed[key] = merged(self.checker.owed.get(key), clock)
            else:
                self.checker.acquire(*key, clock)


def ordering(mods: Modifiers, kind: str) -> tuple[str, bool]:
    """(scope, whether it is relaxed) of a release or an acquire. Removes the modifiers."""
    relaxed = mods.take("relaxed") is not None
    mods.take(kind)
    return mods.take(*SCOPES) or "cta", relaxed


def active(m: State, mask: Array | None) -> list[tuple[int, int]]:
    """(CTA, thread) of each lane of the mask."""
    if mask is None:
        mask = np.ones(m.shape, bool)
    cta, thread = np.nonzero(np.broadcast_to(mask, m.shape))
    return list(zip(cta.tolist(), thread.tolist(), strict=True))


def shared_address(value: int, generic: bool) -> int:
    """The address in shared memory, of a CTA or with its rank, that an operand means."""
    return value - SHARED_WINDOW if generic and value >= SHARED_WINDOW else value


@instruction("mbarrier")
def build_mbarrier(d: Decoder, ins: Instruction) -> Action | None:
    """All but the waits."""
    mods = Modifiers(ins)
    what = mods.take("init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "pending_count")
    expects = what in ("arrive", "arrive_drop") and mods.take("expect_tx") is not None
    completes = mods.take("noComplete") is None
    scope, relaxed = ordering(mods, "release")
    space = mods.take("shared", "shared::cta", "shared::cluster") or "generic"
    kind = mods.types()
    mods.end()
    operands = list(ins.operands)
    if what is None or kind != ["b64"] or not (completes or what in ("arrive", "arrive_drop")):
        raise Unsupported(f"unsupported: {ins.text}")
    if what == "pending_count":
        return _pending_count(d, ins)
    remote = space == "shared::cluster"
    out = -1
    if what in ("arrive", "arrive_drop"):
        target = operands.pop(0)
        if remote and not isinstance(target, Sink):
            raise Unsupported(f"unsupported: the state of another CTA's mbarrier: {ins.text}")
        out = -1 if isinstance(target, Sink) else d.destination(target, "b64", ins)
    base, offset, _ = d.address(operands[0], ins)
    value = d.source(operands[1], "u32", ins) if len(operands) > 1 else -1
    needed = what in ("init", "expect_tx", "complete_tx") or expects or not completes
    if (needed and value < 0) or (what == "inval" and value >= 0):
        raise Unsupported(f"unsupported: {ins.text}")
    text, number, generic = ins.text, d.current, space == "generic"

    def act(m: State, mask: Array | None) -> None:
        m.tick(number)
        addresses = m.full(effective(m, base, offset))
        values = None if value < 0 else m.full(m.r[value])
        states = None if out < 0 else np.array(m.full(m.r[out]))
        for cta, thread in active(m, mask):
            address = shared_address(int(addresses[cta, thread]), generic)
            owner, place = owner_of(m, cta, address, text, remote=remote or generic)
            amount = 1 if values is None else int(values[cta, thread])
            m.shared.check(np.array([place]), BYTES, BYTES, text)
            if what == "init":
                m.of(MBarriers).init(owner, place, amount, thread, text)
                continue
            who = m.agent(cta, thread)
            b = m.of(MBarriers).find(owner, place, who, text)
            touch(m, owner, cta, who, text)
            if what == "inval":
                if b.sleepers:
                    raise EmulationError(f"inval of {m.of(MBarriers).name(b)}, at which threads wait: {text}")
                m.of(MBarriers).end(owner, place)
            elif what in ("expect_tx", "complete_tx"):
                m.of(MBarriers).expect(b, amount if what == "expect_tx" else -amount, text)
                m.of(MBarriers).advance(b)
            else:
                if states is not None:
                    states[cta, thread] = b.phase << 32 | b.pending
                if isinstance(m.checker, ClusterChecker):
                    release = m.checker.release_of(cta // m.cluster, who, scope, relaxed)
                    if release is not None:
                        b.arriving.add(release[0], owner == cta, release[1])
                if expects:
                    m.of(MBarriers).expect(b, amount, text)
                count = 1 if expects else amount
                if what == "arrive_drop":
                    b.count -= count
                if not completes and b.pending == count:
                    raise EmulationError(f"noComplete ends the phase of {m.of(MBarriers).name(b)}, {b.state()}: {text}")
                m.of(MBarriers).arrive(b, count, text)
        if states is not None:
            m.r[out] = states

    return act


def _pending_count(d: Decoder, ins: Instruction) -> Action:
    """The arrivals that were pending when the state was made."""
    out, state = d.destination(ins.operands[0], "b32", ins), d.source(ins.operands[1], "b64", ins)
    return lambda m, mask: m.set(out, (m.r[state] & np.uint64(0xFFFFFFFF)).astype(np.uint32), mask)


@dataclass
class PhaseWait(Wait):
    """`mbarrier.try_wait`, which sleeps, or `test_wait`, which goes on. by_parity: what it waits for is a parity, or
    the state that an arrival gave. scope: of the acquire, which a relaxed one leaves to a fence."""

    base: int
    offset: int
    generic: bool
    out: int
    source: int
    by_parity: bool
    sleeps: bool
    scope: str
    relaxed: bool

    def passed(self, b: MBarrier, token: int) -> bool:
        """Whether the phase that is waited for has ended."""
        if self.by_parity:
            return (b.phase & 1) != (token & 1)
        waited = token >> 32
        if not waited <= b.phase <= waited + 1:
            raise EmulationError(f"the state of phase {waited}, but the mbarrier is in phase {b.phase}: {self.text}")
        return b.phase > waited

    def places(self, m: State, lanes: Array) -> list[tuple[int, int, int, Array]]:
        """(CTA, address, token, flat numbers of the lanes) of each distinct wait among the lanes."""
        flat = np.flatnonzero(lanes)
        address = m.full(effective(m, self.base, self.offset)).reshape(-1)[flat]
        token = m.full(m.r[self.source]).reshape(-1)[flat].astype(np.int64)
        keys, place = np.unique(np.stack([flat // m.threads, address, token]), axis=1, return_inverse=True)
        place = place.reshape(-1)
        return [
            (cta, shared_address(address, self.generic), token, flat[place == i])
            for i, (cta, address, token) in enumerate(keys.T.tolist())
        ]

    def enter(self, m: State, lanes: Array) -> Array:
        """The predicate is true for lanes that pass, and for lanes that sleep, since they wake when they would."""
        m.tick(self.at)
        asleep, failed = np.zeros(m.lanes, bool), np.zeros(m.lanes, bool)
        for cta, address, token, flat in self.places(m, lanes):
            owner, place = owner_of(m, cta, address, self.text, remote=False)
            for warp in np.unique(flat // 32):
                b = m.of(MBarriers).find(owner, place, m.agent(cta, 32 * int(warp) % m.threads), self.text)
            if self.passed(b, token):
                m.of(MBarriers).acquire(b, flat, self)
            elif self.sleeps and not (m.schedule is not None and m.schedule.runs_out()):
                b.sleepers.append(Sleeper(self, flat, token))
                asleep[flat] = True
            else:
                failed[flat] = True
        m.set(self.out, ~failed.reshape(m.shape), lanes)
        m.poll(failed.reshape(m.shape), self.at)
        return asleep.reshape(m.shape)

    def tell(self, m: State, lanes: Array) -> str:
        """The barriers and who waits, for a report of a deadlock."""
        told = []
        for cta, address, token, flat in self.places(m, lanes):
            b = m.of(MBarriers).all[owner_of(m, cta, address, self.text, remote=False)]
            what = f"parity {token & 1}" if self.by_parity else f"the end of phase {token >> 32}"
            told.append(
                f"in `{self.text}` {len(flat)} threads of CTA {int(m.cta_numbers[cta])}, thread "
                f"{int(flat[0]) % m.threads} first, wait for {what} at {m.of(MBarriers).name(b)}: {b.state()}"
            )
        more = f"; and at {len(told) - 4} barriers more" if len(told) > 4 else ""
        return "; ".join(told[:4]) + more


@wait("mbarrier")
def build_phase_wait(d: Decoder, ins: Instruction) -> PhaseWait | None:
    """The wait that an instruction is. Its own time limit changes nothing: a `try_wait` ends when it can, but under a
    seeded schedule some run out of time."""
    mods = Modifiers(ins)
    kind = mods.take("try_wait", "test_wait")
    if kind is None:
        return None
    by_parity = mods.take("parity") is not None
    scope, relaxed = ordering(mods, "acquire")
    generic = mods.take("shared", "shared::cta") is None
    types = mods.types()
    mods.end()
    operands: Any = ins.operands
    if types != ["b64"] or len(operands) not in ((3, 4) if kind == "try_wait" else (3,)):
        raise Unsupported(f"unsupported: {ins.text}")
    base, offset, _ = d.address(operands[1], ins)
    out, source = d.destination(operands[0], "pred", ins), d.source(operands[2], "u32" if by_parity else "b64", ins)
    return PhaseWait(
        d.current, ins.text, base, offset, generic, out, source, by_parity, kind == "try_wait", scope, relaxed
    )
