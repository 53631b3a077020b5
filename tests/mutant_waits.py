"""Waits that wait for nothing, and mbarriers that nobody waits at, in a launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

from mutant_runs import Same, watched
from ptx_emulator import parse
from ptx_emulator.core.clocks import ClusterChecker
from ptx_emulator.core.forms.bulk import Bulk, Groups
from ptx_emulator.core.forms.mbarriers import MBarriers, PhaseWait
from ptx_emulator.mutants import Mutant, Subject
from ptx_emulator.mutants.text import instructions


def _number(subject: Subject, mutant: Mutant, opcode: str) -> int:
    """The number that the emulator has for the mutant's instruction, which is one of those with this opcode."""
    record = subject.record
    code = parse(record.ptx).kernels[record.kernel].instructions
    numbers = [n for n in code.of(opcode.partition(".")[0]) if opcode in code[n].text]
    places = [found.start for found in instructions(record.ptx) if found.opcode.startswith(opcode)]
    assert len(numbers) == len(places)
    return numbers[places.index(mutant.at)]


def waits_for_nothing(subject: Subject, mutant: Mutant) -> bool:
    """Whenever the thread comes there, it knows already that what it would wait for has been read."""
    left: list[tuple[int, int]] = []
    real = Bulk.wait

    def counting(bulk: Bulk, cta: int, thread: int, keep: int, reading: bool) -> None:
        closed = bulk.groups.setdefault((cta, thread), Groups()).closed
        unknown = (not copy.known for group in closed[: max(len(closed) - keep, 0)] for copy in group)
        left.append((bulk.m.trace[-1], sum(unknown)))
        real(bulk, cta, thread, keep, reading)

    number = _number(subject, mutant, "cp.async.bulk.wait_group")
    with patch.object(Bulk, "wait", counting):
        _of_the_launch(subject, Bulk, "commit", lambda *_: None)
    mine = [unknown for at, unknown in left if at == number]
    return bool(mine) and not any(mine) and ".read" in mutant.instruction


def _of_the_launch(subject: Subject, where: Any, name: str, told: Callable[..., Any]) -> list[Any]:
    """What `told` says of each call of a function of the emulator in the launch as it is."""
    return watched(subject, subject.record.ptx, subject.record.arguments, where, name, told)


@cache
def _named(subject: Same, name: str) -> dict[int, set[tuple[int, int]]]:
    """Number of an instruction -> (CTA, address) of the mbarriers that it makes (`init`), or arrives at (`arrive`)."""

    def told(_: Any, state: MBarriers, *given: Any) -> Any:
        place = given[:2] if name == "init" else (given[0].cta, given[0].address)
        return state.m.trace[-1], place

    found: dict[int, set[tuple[int, int]]] = {}
    for number, place in _of_the_launch(subject.it, MBarriers, name, told):
        found.setdefault(number, set()).add(place)
    return found


@cache
def _asked(subject: Same) -> set[tuple[int, tuple[int, int], bool]]:
    """(number of a wait, where it waits, whether it asks for the phase before the first, which passes at once)."""

    def told(_: Any, end: PhaseWait, b: Any, token: int) -> Any:
        return end.at, (b.cta, b.address), (b.phase, token & 1) == (0, 1)

    return set(_of_the_launch(subject.it, PhaseWait, "passed", told))


def _nobody_waits_at(subject: Subject, places: set[tuple[int, int]]) -> bool:
    return bool(places) and all(first for _, place, first in _asked(Same(subject)) if place in places)


def nobody_uses(subject: Subject, mutant: Mutant) -> bool:
    """No arrival, copy or wait names what the instruction makes."""
    made = _named(Same(subject), "init")[_number(subject, mutant, "mbarrier.init")]
    used = _of_the_launch(subject, MBarriers, "find", lambda b, *_: (b.cta, b.address))
    return not made & set(used)


def nobody_waits(subject: Subject, mutant: Mutant) -> bool:
    """Who waits at what the instruction makes, or arrives at, asks for the phase before the first, which is over.

    Arrivals that were too many for the count would be an error.
    """
    opcode, name = ("mbarrier.init", "init") if "init" in mutant.instruction else ("mbarrier.arrive", "arrive")
    return _nobody_waits_at(subject, _named(Same(subject), name).get(_number(subject, mutant, opcode), set()))


def passes_anyway(subject: Subject, mutant: Mutant) -> bool:
    """Each time the wait asks for the phase before the first, which is over, and acquires nothing."""
    number = _number(subject, mutant, "mbarrier.try_wait")
    mine = [first for at, _, first in _asked(Same(subject)) if at == number]
    return bool(mine) and all(mine)


def one_warpgroup(subject: Subject, mutant: Mutant) -> bool:
    """Each phase of what the instruction makes ends by one arrival of each warp of a warpgroup, which has waited.

    Each of these warps knows of the same products that their operands were read, so one arrival tells as much as four.
    """
    made, real = (
        _named(Same(subject), "init")[_number(subject, mutant, "mbarrier.init")],
        ClusterChecker.release_of,
    )
    last: list[tuple[int, int]] = []  # of the arrival under way: its warp, and which products that has waited for

    def released(checker: ClusterChecker, cluster: int, agent: int, scope: str, relaxed: bool) -> Any:
        rank, warp = divmod(agent, checker.m.warps)
        products = checker.size * checker.m.warps + rank * checker.groups + warp // 4
        last[:] = [(warp, int(checker.seen[cluster, agent, products]))]
        return real(checker, cluster, agent, scope, relaxed)

    def told(_: Any, __: Any, b: Any, *___: Any) -> Any:
        return (b.cta, b.address), *last[0]

    with patch.object(ClusterChecker, "release_of", released):
        arrivals = _of_the_launch(subject, MBarriers, "arrive", told)
    warps: dict[tuple[Any, int], list[int]] = {}
    for place, warp, known in arrivals:
        if place in made:
            warps.setdefault((place, known), []).append(warp)
    first = {min(them) // 4 * 4 for them in warps.values()}
    return len(first) == 1 and all(sorted(them) == list(range(min(first), min(first) + 4)) for them in warps.values())
