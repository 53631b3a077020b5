"""Whether a mutant is seen, and by what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ptx_emulator.core.errors import EmulationError, Trap
from ptx_emulator.core.formats import bf16_to_f32
from ptx_emulator.core.spaces import Array
from ptx_emulator.cuda import Record, run
from ptx_emulator.mutants.plant import Mutant

#: (landing, seed) of the runs that a mutant gets until one of them sees it.
RUNS = (("late", None), ("early", None), ("random", 0), ("random", 1))
#: The same with the cheaper one first, for long launches: copies that land early leave nobody waiting.
EARLY_FIRST = (RUNS[1], RUNS[0], *RUNS[2:])
#: Families of which a mutant leaves order as it was: it gets the first of the runs alone.
UNORDERED = ("product", "descriptor", "immediate", "tensor map")
VALUES = "wrong values"
SAME = "the operand is what it was"
UNREACHED = "never reached"
FOUND, STOPPED, REFUSED = "finding", "error", "refused launch"


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant."""

    mutant: Mutant
    how: str = ""  #: "finding", "error", "refused launch" or "wrong values"; "" where nothing saw it
    by: str = ""  #: the finding's kind or the error's name; of one that nothing saw a reason that a probe found, or ""
    landing: str = ""  #: of the run that saw it
    change: float = 0.0  #: of one that nothing saw: the largest relative change of an output, root mean square


@dataclass(frozen=True)
class Subject:
    """A launch to be mutated, and what it makes.

    Raises ValueError where the launch itself is not without findings under each of `runs`, with equal outputs.
    """

    name: str  #: for tables
    record: Record  #: with its memory before the launch, outputs filled by NaN
    outputs: Mapping[str, str]  #: name of a buffer -> "bf16", or "" where its array's type says what it holds
    tolerance: float = 4e-3  #: relative change of an output, root mean square, above which it is wrong
    runs: tuple[tuple[str, int | None], ...] = RUNS  #: schedules, as `RUNS`, in their order

    def right(self) -> dict[str, Array]:
        """The outputs of the launch as it is."""
        return self._right

    @cached_property
    def _right(self) -> dict[str, Array]:
        made = []
        for landing, seed in self.runs:
            kinds, outputs = _execute(self, self.record, landing, seed)
            if kinds:
                raise ValueError(f"{self.name} is not right itself, {landing} {seed}: {', '.join(kinds)}")
            made.append(outputs)
        for other in made[1:]:
            if any(difference(made[0][name], other[name]) for name in other):
                raise ValueError(f"{self.name} makes one output under one schedule and another under another")
        return made[0]

    @cached_property
    def reached(self) -> dict[int, bool]:
        """Whether an instruction runs, by where it begins: what `judge` has found out."""
        return {}


def judge(
    subject: Subject, mutant: Mutant, right: Mapping[str, Array], proof: Callable[[Subject, Mutant], str] | None = None
) -> Verdict:
    """Run a mutant until it is seen, or until there is a proof that it changes nothing.

    Args:
        subject: where it is from.
        mutant: one of `mutants(subject.record)`.
        right: `subject.right()`.
        proof: says of a mutant that its first run has not shown why none will, "" if it does not know. Before it the
            mutant's own probes are asked.
    """
    changed, by = 0.0, ""
    runs = subject.runs[:1] if mutant.family in UNORDERED else subject.runs
    for landing, seed in runs:
        try:
            kinds, outputs = _execute(subject, mutant.record, landing, seed)
        except EmulationError as error:
            return Verdict(mutant, STOPPED, type(error).__name__, landing)
        except ValueError as error:
            if not str(error).startswith("tensor map"):
                raise
            return Verdict(mutant, REFUSED, "tensor map", landing)
        if kinds:
            return Verdict(mutant, FOUND, kinds[0], landing)
        change = max(difference(right[name], outputs[name]) for name in outputs)
        if not change <= subject.tolerance:
            return Verdict(mutant, VALUES, VALUES, landing)
        changed = max(changed, change)
        if (landing, seed) == runs[0] and not changed:
            by = _reason(subject, mutant) or (proof(subject, mutant) if proof else "")
        if by:
            break
    return Verdict(mutant, by=by, change=changed)


def _reason(subject: Subject, mutant: Mutant) -> str:
    if mutant.reach and mutant.at not in subject.reached:
        subject.reached[mutant.at] = _traps(subject, mutant.reach)
    if mutant.reach and not subject.reached[mutant.at]:
        return UNREACHED
    if mutant.probe and not _traps(subject, mutant.probe):
        return SAME
    return ""


def _traps(subject: Subject, ptx: str) -> bool:
    try:
        _execute(subject, replace(subject.record, ptx=ptx), *subject.runs[0], checks=False)
    except Trap:
        return True
    return False


def _execute(
    subject: Subject, record: Record, landing: str, seed: int | None, checks: bool = True
) -> tuple[list[str], dict[str, Array]]:
    """(kinds of findings, outputs as floats or integers) of a launch on memory of its own."""
    buffers = {name: array.copy() for name, array in record.buffers.items()}
    report = run(replace(record, buffers=buffers), landing=landing, seed=seed, checks=checks)
    kinds = list(dict.fromkeys(fault.kind for fault in report.faults))
    return kinds, {name: as_numbers(buffers[name], kind) for name, kind in subject.outputs.items()}


def as_numbers(array: Array, kind: str) -> Array:
    """A buffer's contents as `Subject.outputs` says what they are."""
    return bf16_to_f32(array) if kind == "bf16" else array


def difference(right: Array, made: Array) -> float:
    """Root mean square of the difference over that of the right values; infinite where others are NaN than were."""
    first, second = right.astype(np.float64), made.astype(np.float64)
    if (np.isnan(first) != np.isnan(second)).any():
        return float("inf")
    error, size = (float(np.sqrt(np.nanmean(x**2))) for x in (second - first, first))
    return error / size if size else float("inf") * bool(error)
