"""The speed model of kernels that are written in CUDA C++, by arithmetic alone: nothing is compiled, run or timed.

    main    = max(tensor cores, shared memory, intake, issue, special functions)      cycles of one CTA
    wait    = start + loads in a chain + epilogues                 cycles in which a CTA's tensor cores wait
    cycles  = of the busiest multiprocessor: max(sum of main + the last wait, longest row of CTAs one behind the other)
    time    = max(cycles / clock, L2 bytes / bandwidth, DRAM bytes / bandwidth) + gap of a launch

So whole CTAs go to whole multiprocessors. A second CTA on a multiprocessor hides the waits of the first, all but the
last; so do two halves of a CTA's warps that are set apart in time. What passes through shared memory in an epilogue is
a part of `main` where the epilogue is hidden, and a part of `wait` where it is not. CTAs or halves that wait at the
same time hide less: by `hides`, and by how far a ring lets one half run ahead of the other. Devices and their rates are
those of `ptx_emulator.predict.devices`.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ptx_emulator.predict.devices import Constant, Device

_SHARED = Constant(128, "B/clk/SM", "32 banks of 4 bytes: CUDA programming guide")
_INTAKE = Constant(64, "B/clk/SM", "nominal width of an SM's port from L2, multicast included", assumed=True)
_SCHEDULERS = Constant(4, "per SM", "CUDA programming guide: each issues one warp instruction a clock")
_SPECIAL = Constant(16, "results/clk/SM", "CUDA programming guide, arithmetic throughput: ex2, rcp, rsqrt")
_STALL = Constant(0.4, "of the clocks", "in which a warp alone on its scheduler waits in an epilogue", assumed=True)
_START = Constant(1000, "clocks", "from a CTA's begin to its first operands from DRAM", assumed=True)
_LATENCY = Constant(600, "clocks", "from a load to its value, where threads load one behind the other", assumed=True)
_HIDES = Constant(
    1, "of the waits", "hidden by another CTA or half of the warps, all but the last: they never meet", assumed=True
)  # fmt: skip
_GAP = Constant(1e-6, "s", "between two launches of a CUDA graph", assumed=True)
_LOCAL = Constant(262144, "B/SM", "shared memory and L1 together: CUDA programming guide, compute capability 9.0")


@dataclass(frozen=True)
class Assumptions:
    """What the model adds to a device's constants."""

    shared: float = _SHARED
    intake: float = _INTAKE
    schedulers: float = _SCHEDULERS
    special: float = _SPECIAL
    stall: float = _STALL
    start: float = _START
    latency: float = _LATENCY
    hides: float = _HIDES
    gap: float = _GAP
    local: float = _LOCAL


#: The same, each with its unit and its source.
CONSTANTS: dict[str, Constant] = {
    "shared memory": _SHARED, "intake": _INTAKE, "schedulers": _SCHEDULERS, "special functions": _SPECIAL,
    "stall": _STALL, "start": _START, "latency": _LATENCY, "hides": _HIDES, "gap": _GAP, "shared memory and L1": _LOCAL,
}  # fmt: skip
USUAL = Assumptions()
#: Multiprocessors of each GPC on a card of 132, as is usual: a cluster lies inside of one. Assumed.
GPCS = (16, 16, 16, 16, 16, 16, 18, 18)
#: Resources of a multiprocessor, as keys of `Time.parts`; `l2` and `dram` are the chip's.
MULTIPROCESSOR = ("tensor", "shared", "intake", "issue", "special")


@dataclass(frozen=True)
class Cta:
    """What one CTA asks of its multiprocessor."""

    tensor: Mapping[str, float]  # instruction -> FLOP
    shared: float = 0.0  # bytes that shared memory hands over or takes beside products
    staged: float = 0.0  # the same in epilogues
    intake: float = 0.0  # bytes that come in from L2
    issue: float = 0.0  # warp instructions beside products, which overlap them
    special: float = 0.0  # results of special functions that overlap products
    epilogue: float = 0.0  # warp instructions while the CTA's tensor cores wait
    warps: int = 4  # that share an epilogue
    staggered: bool = False  # its warps are two halves that hide each other's waits, and the next CTA begins meanwhile
    longest: float = 0.0  # staggered: warp instructions of one half's longest epilogue
    slack: float = 0.0  # staggered: FLOP by `wgmma` that one half may be ahead of the other, which the ring allows
    chain: float = 0.0  # loads one behind the other that nothing of the CTA overlaps

    @property
    def flops(self) -> float:
        return sum(self.tensor.values())


@dataclass(frozen=True)
class Launch:
    """One launch: how often which CTA, and the bytes of all of them."""

    name: str
    ctas: Sequence[tuple[int, Cta]]  # in the order of the grid
    l2: float  # bytes that L2 hands over or takes; what is multicast, once a cluster
    dram: float  # bytes of the tensors, each once
    cluster: int = 1
    per_sm: int = 1
    spilled: int = 0  # bytes of a CTA that L2 takes and hands over beside `l2`

    @property
    def count(self) -> int:
        return sum(count for count, _ in self.ctas)

    @property
    def flops(self) -> float:
        return sum(count * cta.flops for count, cta in self.ctas)


@dataclass(frozen=True)
class Time:
    """One launch on one device. Microseconds that each resource alone would allow."""

    name: str
    ctas: int
    rounds: int  # CTAs one behind the other on the busiest multiprocessor
    parts: Mapping[str, float] = field(default_factory=dict)
    sm: float = 0.0  # the busiest multiprocessor's, with what its tensor cores wait for
    gap: float = 0.0
    floor: float = 0.0  # the larger of FLOP / peak and DRAM bytes / bandwidth

    @property
    def us(self) -> float:
        return max(self.sm, self.parts["l2"], self.parts["dram"]) + self.gap

    @property
    def waits(self) -> float:
        """Of `sm`, what no resource explains: starts and epilogues that nothing hides."""
        return self.sm - max(self.parts[name] for name in MULTIPROCESSOR)

    @property
    def bound_by(self) -> str:
        """What takes the time: DRAM or L2 where they take longest, else the busiest part of a multiprocessor."""
        chip = max(("l2", "dram"), key=lambda name: self.parts[name])
        if self.parts[chip] >= self.sm:
            return chip
        most = max(MULTIPROCESSOR, key=lambda name: self.parts[name])
        return most if self.parts[most] > self.waits else "waits"


def needs(cta: Cta, device: Device, by: Assumptions = USUAL) -> dict[str, float]:
    """Cycles that each resource of a multiprocessor works for a CTA."""
    tensor = sum(flops / (device.tensor[kind] * device.efficiency) for kind, flops in cta.tensor.items())
    return {
        "tensor": tensor, "shared": (cta.shared + cta.staged) / by.shared, "intake": cta.intake / by.intake,
        "issue": (cta.issue + cta.epilogue) / by.schedulers, "special": cta.special / by.special,
    }  # fmt: skip


def main_cycles(cta: Cta, device: Device, by: Assumptions = USUAL) -> float:
    """Cycles of a CTA's products and of what overlaps them."""
    of = needs(cta, device, by)
    return max(of["tensor"], of["shared"], of["intake"], of["special"], cta.issue / by.schedulers)


def halves(cta: Cta) -> int:
    """Of a CTA's warps, which have rows of their own and do not wait for each other."""
    return 2 if cta.staggered else 1


def wait_cycles(cta: Cta, by: Assumptions = USUAL) -> float:
    """Cycles in which nothing of a CTA, or of one half of it, gives tensor cores anything to do."""
    share = halves(cta)
    warps = cta.warps / share / by.schedulers
    epilogue = max(epilogue_cycles(cta.epilogue / share, warps, by), cta.staged / share / by.shared)
    return by.start + cta.chain * by.latency + epilogue


def _longer(cta: Cta, device: Device, by: Assumptions) -> float:
    """Cycles by which a half's longest epilogue outlasts what the other half can do meanwhile."""
    if not cta.staggered:
        return 0.0
    epilogue = epilogue_cycles(cta.longest, cta.warps / 2 / by.schedulers, by)
    return max(epilogue - cta.slack / (device.tensor["wgmma"] * device.efficiency), 0.0)


def alone_cycles(cta: Cta, device: Device, by: Assumptions = USUAL) -> float:
    """Cycles of a CTA, or of one half of it, that has the multiprocessor to itself."""
    return main_cycles(replace(cta, staged=0.0), device, by) / halves(cta) + wait_cycles(cta, by)


def epilogue_cycles(instructions: float, warps: float, by: Assumptions = USUAL) -> float:
    """Cycles for so many warp instructions of a CTA, by so many warps on each scheduler."""
    return instructions / (by.schedulers * (1 - by.stall ** max(warps, 1.0)))


def usable(processors: int, cluster: int, per_sm: int) -> int:
    """CTAs that are resident at once, when clusters lie inside of GPCs."""
    gpcs = GPCS if processors == sum(GPCS) else (processors,)
    return sum(size * per_sm // cluster * cluster for size in gpcs)


def predict(launch: Launch, device: Device, by: Assumptions = USUAL) -> Time:
    """How long a launch takes, by the model."""
    slots = usable(device.target.processors, launch.cluster, launch.per_sm)
    busy, sums, rounds = _busiest(launch, device, min(device.target.processors, -(-slots // launch.per_sm)), by)
    us = 1e6 / device.clock
    parts = {name: us * cycles for name, cycles in sums.items()}
    parts |= {
        "l2": 1e6 * (launch.l2 + launch.count * launch.spilled) / device.l2,
        "dram": 1e6 * launch.dram / device.dram,
    }
    return Time(
        launch.name, launch.count, rounds, parts, max(us * busy, *(parts[name] for name in MULTIPROCESSOR)),
        1e6 * by.gap, 1e6 * max(launch.flops / device.peak, launch.dram / device.dram),
    )  # fmt: skip


def _busiest(launch: Launch, device: Device, processors: int, by: Assumptions) -> tuple[float, dict[str, float], int]:
    """(cycles of the busiest multiprocessor, of each resource, the most CTAs of one).

    CTAs go, in their order, to the multiprocessor that has the least to do until then.
    """
    places = max(min(processors, launch.count), 1)
    loads = [(0.0, place) for place in range(places)]
    held = [[0.0] * launch.per_sm for _ in range(places)]  # by slot, one CTA behind the other
    mains, exposed, counts = [0.0] * places, [0.0] * places, [0] * places
    sums = [dict.fromkeys(MULTIPROCESSOR, 0.0) for _ in range(places)]
    for count, cta in launch.ctas:
        main, alone, of = main_cycles(cta, device, by), alone_cycles(cta, device, by), needs(cta, device, by)
        wait = wait_cycles(cta, by)
        last = wait - (main - main_cycles(replace(cta, staged=0.0), device, by)) / halves(cta)
        took, more = max(main, alone / launch.per_sm), [0] * places
        for _ in range(count):
            load, place = loads[0]
            heapq.heapreplace(loads, (load + took, place))
            slots = held[place]
            slots[slots.index(min(slots))] += alone
            more[place] += 1
        for place, number in enumerate(more):
            if number:
                met = max((1 - by.hides) * wait / (launch.per_sm * halves(cta)), _longer(cta, device, by))
                exposed[place] = last - met
                mains[place] += number * (main + met)
            counts[place] += number
            for name in MULTIPROCESSOR:
                sums[place][name] += number * of[name]
    busy = max(max(*slots, main + last) for slots, main, last in zip(held, mains, exposed, strict=True))
    return busy, {name: max(one[name] for one in sums) for name in MULTIPROCESSOR}, max(counts)
