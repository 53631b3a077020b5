"""Ends of blocks at which lanes may sleep: CTA barriers with their reductions, and barriers of a warp.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions: bar, barrier, bar.warp.sync".
"""

from dataclasses import dataclass

import numpy as np

from ptx_emulator.core.decode import Decoder, Modifiers, wait
from ptx_emulator.core.errors import Divergence, EmulationError, Unsupported
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.state import Part, State, Wait
from ptx_emulator.core.syntax import Instruction

BARRIERS = 16


@dataclass
class Reduction:
    """What `bar.red` makes of a predicate of every thread: popc, and, or. negated: of its complement."""

    name: str
    out: int
    source: int
    negated: bool

    def votes(self, m: State) -> Array:
        """The predicate of each lane, (CTAs, threads)."""
        flags = m.full(m.r[self.source])
        return ~flags if self.negated else flags

    def result(self, votes: Array, count: Array) -> Array:
        """The destination's value from the votes for it and the number of voters."""
        if self.name == "popc":
            return votes.astype(np.uint32)
        return votes > 0 if self.name == "or" else votes == count


@dataclass
class CtaBarrier(Wait):
    """`bar` or `barrier` of a CTA. `count` is None when every live thread takes part; `waits` is False for `arrive`."""

    number: int
    count: int | None
    waits: bool
    aligned: bool
    reduction: Reduction | None = None

    def together(self, m: State, live: Array | None) -> bool:
        """Pass, where all live lanes of the batch have come to it and wait for each other."""
        if self.count is not None or not self.waits or m.r[self.number].size > 1:
            return False
        m.counters.barriers += m.ctas
        m.tick(-1)
        if m.checker is not None:
            m.checker.barrier_all()
        if self.reduction is not None:
            everyone = np.ones(m.shape, bool) if live is None else live
            votes = (self.reduction.votes(m) & everyone).sum(1, keepdims=True)
            m.set(self.reduction.out, self.reduction.result(votes, everyone.sum(1, keepdims=True)), live)
        return True

    def enter(self, m: State, lanes: Array) -> Array:
        """Count the lanes that arrive; returns those that sleep."""
        names = m.full(m.r[self.number])
        counts = None if self.count is None else m.full(m.r[self.count])
        if int(names[lanes].max()) >= BARRIERS:
            raise Unsupported(f"unsupported: barrier {int(names[lanes].max())} of {BARRIERS} in {self.text}")
        m.of(CtaBarriers).arrive(m, self, lanes, names, counts)
        return lanes if self.waits else np.zeros(m.shape, bool)

    def tell(self, m: State, lanes: Array) -> str:
        """Who sleeps, for a report of a deadlock."""
        found = []
        for cta in np.flatnonzero(lanes.any(1))[:1]:
            for name in np.unique(m.of(CtaBarriers).name[cta][lanes[cta]]):
                count = int((lanes[cta] & (m.of(CtaBarriers).name[cta] == name)).sum())
                state = m.of(CtaBarriers)
                wanted = int(state.expected[cta, name]) or "every live thread"
                found.append(
                    f"in `{self.text}` CTA {int(m.cta_numbers[cta])} has {count} threads at barrier {name}, where "
                    f"{int(state.arrived[cta, name])} of {wanted} arrived"
                )
        return "; ".join(found)


class CtaBarriers(Part):
    """The sixteen barriers of each CTA of a batch."""

    def __init__(self, m: State) -> None:
        ctas, threads = m.shape
        self.arrived: Array = np.zeros((ctas, BARRIERS), np.int64)
        self.expected: Array = np.zeros((ctas, BARRIERS), np.int64)  # 0: every live thread
        self.votes: Array = np.zeros((ctas, BARRIERS), np.int64)
        self.reduces: Array = np.zeros((ctas, BARRIERS), bool)  # who arrived did so by `bar.red`
        self.taking_part: Array = np.zeros((ctas, BARRIERS, threads // 32), bool)
        self.went_on: dict[tuple[int, int], dict[int, Array]] = {}  # clocks of warps that arrived and did not wait
        self.name: Array = np.full((ctas, threads), -1, np.int32)  # the barrier a lane sleeps at

    def part(self, m: State, ctas: Array) -> "CtaBarriers":
        """The barriers of some CTAs."""
        other = CtaBarriers(m)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(other, name, value[ctas])
        places = {cta: place for place, cta in enumerate(ctas.tolist())}
        other.went_on = {(places[cta], name): of for (cta, name), of in self.went_on.items() if cta in places}
        return other

    def arrive(self, m: State, end: CtaBarrier, lanes: Array, names: Array, counts: Array | None) -> None:
        """The lanes arrive at the barriers `names`."""
        for name in np.unique(names[lanes]):
            here = lanes & (names == name)
            ctas = here.any(1)
            self._agree(m, end, here, ctas, int(name), counts)
            self.arrived[:, name] += here.sum(1)
            self.taking_part[:, name] |= here.reshape(m.ctas, m.warps, 32).any(2)
            self._check_number(m, end, ctas, int(name))
            if end.reduction is not None:
                self.votes[:, name] += (end.reduction.votes(m) & here).sum(1)
            if end.waits:
                self.name[here] = name
            elif m.checker is not None:
                for cta, warp in np.argwhere(here.reshape(m.ctas, m.warps, 32).any(2)).tolist():
                    self.went_on.setdefault((cta, int(name)), {})[warp] = m.checker.clock(cta, warp)

    def _agree(self, m: State, end: CtaBarrier, here: Array, ctas: Array, name: int, counts: Array | None) -> None:
        """The lanes of some CTAs arrive: all who take part must name one number of threads, and reduce or not."""
        wanted = np.zeros(m.ctas, np.int64)
        if counts is not None:
            wanted = np.where(here, counts, 0).max(1)
            bad = ctas & (((counts != wanted[:, None]) & here).any(1) | (wanted % 32 > 0) | (wanted == 0))
            if bad.any():
                some = sorted({*counts[bad][here[bad]].tolist()})
                raise EmulationError(f"barrier {name} takes one multiple of 32 threads, not {some}: {end.text}")
        reduces = end.reduction is not None
        for cta in np.flatnonzero(ctas & (self.arrived[:, name] > 0)).tolist():
            before, now = (int(count[cta]) or m.threads for count in (self.expected[:, name], wanted))
            if before != now:
                raise EmulationError(f"{now} threads at barrier {name}, where others wait for {before}: {end.text}")
            if self.reduces[cta, name] != reduces:
                raise EmulationError(f"a reduction and a plain arrival meet at barrier {name}: {end.text}")
        self.expected[ctas, name], self.reduces[ctas, name] = wanted[ctas], reduces

    def _check_number(self, m: State, end: CtaBarrier, ctas: Array, name: int) -> None:
        """Raise where more threads have come than take part: which of them met is open. Warps may come one by one."""
        arrived, expected = self.arrived[:, name], self.expected[:, name]
        more = ctas & (arrived > expected) & (expected > 32)
        if more.any():
            cta = int(np.flatnonzero(more)[0])
            raise EmulationError(
                f"{int(arrived[cta])} threads of CTA {int(m.cta_numbers[cta])} come to one phase of barrier {name}, in "
                f"which {int(expected[cta])} take part: {end.text}"
            )

    def settle(self, m: State) -> None:
        """Complete every barrier that all its threads have reached."""
        if not self.arrived.any():
            return
        for cta, name in zip(*np.nonzero(self.arrived), strict=True):
            expected = int(self.expected[cta, name]) or int(m.live[cta].sum())
            if self.arrived[cta, name] < expected:
                continue
            here = np.zeros(m.shape, bool)
            here[cta] = self.name[cta] == name
            self._check_aligned(m, here)
            m.counters.barriers += 1
            m.tick(-1)
            self._tell(m, int(cta), int(name), here[cta].reshape(m.warps, 32).any(1), expected)
            self._reduce(m, here, self.votes[cta, name], self.arrived[cta, name])
            m.wake(here)
            self.name[here] = -1
            self.arrived[cta, name] = self.expected[cta, name] = self.votes[cta, name] = 0
            self.taking_part[cta, name] = False
            self.went_on.pop((cta, name), None)

    def _tell(self, m: State, cta: int, name: int, waited: Array, expected: int) -> None:
        """Tell the checker which warps have met: each with itself alone, where the barrier is one of 32 threads."""
        if m.checker is None:
            return
        came = self.taking_part[cta, name]
        if expected == 32:
            for warps in np.diag(came & waited)[came & waited]:
                m.checker.barrier(cta, warps, warps)
        else:
            before = self.went_on.get((cta, name), {})
            stays = came.copy()
            stays[list(before)] = False
            m.checker.barrier(cta, stays, waited, list(before.values()))

    def _check_aligned(self, m: State, here: Array) -> None:
        """The lanes of a warp that wait must do so by one instruction if it is an aligned one."""
        block, waits = m.asleep.reshape(-1, 32), here.reshape(-1, 32)
        first = np.take_along_axis(block, waits.argmax(1)[:, None], axis=1)
        apart = (waits & (block != first)).reshape(m.shape)
        for end, _ in m.sleepers(apart):
            if isinstance(end, CtaBarrier) and end.aligned:
                raise Divergence(
                    f"reached by some lanes of a warp only, the others wait elsewhere: {end.text}"
                ).located(m.kernel.where(end.at))

    def _reduce(self, m: State, here: Array, votes: Array, count: Array) -> None:
        """Give the lanes that sleep at a `bar.red` its result."""
        for end, lanes in m.sleepers(here):
            if isinstance(end, CtaBarrier) and end.reduction is not None:
                m.set(end.reduction.out, end.reduction.result(votes, count), lanes)


@wait("bar", "barrier")
def cta_barrier(d: Decoder, ins: Instruction) -> CtaBarrier | None:
    """The CTA barrier that an instruction is."""
    if "warp" in ins.modifiers or "cluster" in ins.modifiers:
        return None
    mods = Modifiers(ins)
    kind = mods.take("sync", "arrive", "red")
    aligned = mods.take("aligned") is not None or ins.root == "bar"
    mods.drop("cta")
    operands, reduction = list(ins.operands), None
    if kind == "red":
        name, types = mods.take("popc", "and", "or"), mods.types()
        if name is None or types != ["u32" if name == "popc" else "pred"] or len(operands) < 3:
            raise Unsupported(f"unsupported: {ins.text}")
        out = d.destination(operands.pop(0), types[0], ins)
        reduction = Reduction(name, out, *d.predicate_source(operands.pop(), ins))
    mods.end()
    if kind is None or (kind == "arrive" and len(operands) != 2):
        raise Unsupported(f"unsupported: {ins.text}")
    numbers = [d.source(operand, "u32", ins) for operand in operands]
    count = numbers[1] if len(numbers) > 1 else None
    return CtaBarrier(d.current, ins.text, numbers[0], count, kind != "arrive", aligned, reduction)


@dataclass
class WarpBarrier(Wait):
    """`bar.warp.sync`: a lane waits for the lanes of its warp that the mask names and that have not left."""

    members: int

    def together(self, m: State, live: Array | None) -> bool:
        """All lanes of each warp are here."""
        meet(m, np.broadcast_to(True, m.shape) if live is None else live)
        return True

    def enter(self, m: State, lanes: Array) -> Array:
        """Sleep; `settle` wakes the lanes of a warp when the last has come, which may be at once."""
        masks = m.full(m.r[self.members]).astype(np.int64)
        m.of(WarpBarriers).mask[lanes] = masks[lanes]
        return lanes

    def tell(self, m: State, lanes: Array) -> str:
        """Who sleeps, for a report of a deadlock."""
        return waiting(m, self.text, lanes, m.of(WarpBarriers).mask)


def waiting(m: State, text: str, lanes: Array, masks: Array) -> str:
    """Which lanes wait at an instruction for those of their warps that their masks name."""
    cta, thread = (int(i[0]) for i in np.nonzero(lanes))
    return (
        f"in `{text}` CTA {int(m.cta_numbers[cta])} has {int(lanes[cta].sum())} threads, "
        f"thread {thread} first, that wait for lanes {int(masks[cta, thread]):#010x} of their warp"
    )


def gathered(m: State, masks: Array) -> Array:
    """Of the lanes that have come, each with a mask above 0, those for which every live lane of their mask has come
    with an equal one."""
    rows, live = masks.reshape(-1, 32), m.live.reshape(-1, 32)
    bit = np.int64(1) << np.arange(32)
    ready = np.zeros(rows.shape, bool)
    for row in np.flatnonzero(rows.any(1)):
        for mask in np.unique(rows[row][rows[row] > 0]):
            here = rows[row] == mask
            wanted = ((mask & bit) != 0) & live[row]
            if (here | ~wanted).all():
                ready[row] |= here
    return ready.reshape(m.shape)


def meet(m: State, lanes: Array) -> None:
    """Tell the checker that these lanes have met those of their warps."""
    if m.checker is not None:
        m.checker.lanes_met(np.any(lanes.reshape(m.ctas, m.warps, 32), axis=2))


class WarpBarriers(Part):
    """The lanes of a batch that sleep at a `bar.warp.sync`, each with its mask; 0: does not."""

    def __init__(self, m: State) -> None:
        self.mask: Array = np.zeros(m.shape, np.int64)

    def settle(self, m: State) -> None:
        """Wake the lanes for which every live lane of their mask has come with an equal mask."""
        if not self.mask.any():
            return
        ready = gathered(m, self.mask)
        if ready.any():
            meet(m, ready)
            m.wake(ready)
            self.mask[ready] = 0


@wait("bar", "barrier")
def warp_barrier(d: Decoder, ins: Instruction) -> WarpBarrier | None:
    """The warp barrier that an instruction is."""
    if "warp" not in ins.modifiers:
        return None
    if ins.modifiers != ("warp", "sync") or len(ins.operands) != 1:
        raise Unsupported(f"unsupported: {ins.text}")
    return WarpBarrier(d.current, ins.text, d.source(ins.operands[0], "b32", ins))
