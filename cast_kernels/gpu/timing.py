"""The one timer: interleaved samples, their spread, and speed-ups as ratios within a round.

Machines are shared: another program may take the cores or the GPU's clock at any moment, unnoticed. So steps are timed
in turn, A B C A B C ..., and a speed-up is the median of the rounds' ratios, always with its spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cast_kernels.gpu.machine import Machine, Step

#: Take at least this many samples of every step, even if the time is over: fewer are too few for a spread.
FEWEST = 3
#: From this number of samples on, the spread is their middle half, which leaves out a stray sample; below, it is their
#: range.
_QUARTILES_FROM = 8

#: (step, calls) -> milliseconds of one call, averaged over so many.
Elapsed = Callable[[Step, int], float]


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles, or with the extremes of fewer than eight values."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) < _QUARTILES_FROM:
            return Spread(statistics.median(values), min(values), max(values))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


def interleave(
    elapsed: Elapsed, steps: Mapping[str, Step], samples: int, seconds: float, sample_seconds: float,
    lose: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """Time every step in turn, so that a change of the machine's clock or load affects all alike.

    Args:
        elapsed: times so many calls of a step.
        steps: name -> call. Every one has been called before, so that nothing is left to compile.
        samples: of each step, at most.
        seconds: that all samples together should take; never fewer than :data:`FEWEST` rounds.
        sample_seconds: a sample repeats its call until so much time has passed.
        lose: called for a step that raises, after the last reference to it here is gone; the others go on. None: the
            exception is raised.

    Returns:
        name -> milliseconds of one call, one for each round: the n-th of two steps were measured side by side.
    """
    steps = dict(steps)

    def one_of_each(repeats: Mapping[str, int]) -> dict[str, float]:
        found = {}
        for name in list(steps):
            try:
                found[name] = elapsed(steps[name], repeats[name])
            except Exception as error:
                if lose is None:
                    raise
                del steps[name]
                lose(name, error)
        return found

    first = one_of_each(dict.fromkeys(steps, 1))
    repeats = {name: max(1, round(1e3 * sample_seconds / max(ms, 1e-6))) for name, ms in first.items()}
    slow = all(count == 1 for count in repeats.values())  # then the first calls were a round already
    one_round = sum(repeats[name] * ms for name, ms in first.items()) / 1e3
    left = seconds - sum(first.values()) / 1e3
    rounds = max(FEWEST, min(samples, slow + int(left / one_round) if one_round else samples))
    seen = [first] * slow + [one_of_each(repeats) for _ in range(rounds - slow)]
    return {name: [found[name] for found in seen] for name in steps}


def speedups(baseline: Sequence[float], others: Sequence[float]) -> Spread:
    """How many times faster the others are, by the ratio of each round."""
    return Spread.of([base / other for base, other in zip(baseline, others, strict=True)])


def cold(machine: Machine) -> Elapsed:
    """Times single calls, each with an L2 that holds none of the step's data."""

    def elapsed(step: Step, repeats: int) -> float:
        machine.flush_cache()
        return machine.elapsed_ms(step)

    return elapsed


def host(machine: Machine) -> Elapsed:
    """Times the host's part of a single call, until it has launched all, beginning with an idle GPU."""

    def elapsed(step: Step, repeats: int) -> float:
        machine.synchronise()
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin)

    return elapsed


def median_ms(machine: Machine, step: Step, samples: int, warm_up: int = 3) -> float:
    """Median of one step alone, after calls that compile and allocate."""
    for _ in range(warm_up):
        step()
    machine.synchronise()
    return Spread.of(interleave(machine.elapsed_ms, {"": step}, samples, 60.0, 0.0)[""]).median
