"""One group of a benchmark: candidates with the same result, compared with fp64, then timed in turn."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from groups import Candidate, Work
from measure import Unavailable, rms_error, time_limit
from torch import Tensor
from variants import is_compiled

from cast_kernels.gpu.machine import Machine, Step, require_usable
from cast_kernels.gpu.timing import Elapsed, Spread, cold, interleave, speedups

#: Seconds for building, compiling and checking one candidate.
PREPARE_SECONDS = 300.0
#: A sample repeats its call for so many seconds. On a CPU this averages over the scheduler's turns; on a GPU it hides
#: the first launch and the events' own time.
SAMPLE_SECONDS = {"cpu": 0.15, "cuda": 2e-3}

Row = dict[str, Any]


def compare(
    machine: Machine, work: Work, names: Sequence[str], seconds: float, kind_of_device: str,
    show: Callable[[str, Row], None] = lambda name, row: None,
) -> dict[str, Row]:  # fmt: skip
    """Rows by name, in the order of `names`.

    A row has speed-ups over the first one, the baseline, only if each of its results has at most twice the baseline's
    error. A candidate that cannot run here gives a row with the reason ("missing"). One that raises gives a row with
    the error ("failed"). Both leave the other rows unaffected.

    Args:
        machine: runs them.
        work: the group's work.
        names: rows of it, the baseline first.
        seconds: time left for the whole group.
        kind_of_device: "cpu" or "cuda"; rows of "cuda" are also timed with a cold L2 and as graphs.
        show: called with each row's known figures before any step that may end the process.

    Raises:
        UnusableError: a fault has ended the GPU's context.
    """
    end = time.monotonic() + seconds
    exact = work.exact() if work.exact else {}
    group = _Group(machine, show)
    errors: dict[str, dict[str, float]] = {}
    for name in names:
        row = group.rows[name] = {}
        show(name, {"failed": "the process ended while this row was built and checked"})
        if is_compiled(name):
            torch._dynamo.reset()  # another row's compiled code is of no use, and counts against the limit
        machine.computed()
        limit = min(PREPARE_SECONDS, max(end - time.monotonic(), 1.0))
        with group.losing(name), time_limit(limit, f"building, compiling and checking {name}"):
            group.ready[name], errors[name] = _prepare(work.builders[name], exact)
            row |= _judge(errors, name, names[0], exact) if machine.computed() else {}
            row |= group.ready[name].figures
        show(name, row)
    for name in [name for name in group.ready if is_compiled(name)][:-1]:
        with group.losing(name):
            group.ready[name].step()  # the last reset dropped its code
    machine.free()
    if kind_of_device == "cuda":
        group.note("peak_mib", lambda candidate: machine.peak_bytes(candidate.step) / 2**20)
    if not work.memory_alone:
        _time(group, names[0], work.samples, min(work.seconds, end - time.monotonic()), kind_of_device)
    group.note("kept_mib", lambda candidate: candidate.kept_bytes() / 2**20 if candidate.kept_bytes else None)
    for name in group.ready:
        if machine.stand_in:
            group.rows[name]["stand_in"] = machine.stand_in
        if name in work.predicted:
            group.rows[name]["predicted_ms"] = work.predicted[name]
    if work.memory_alone:
        _share_memory(group.rows, names[0])
    return group.rows


class _Group:
    """Rows, and the candidates that still run. An error of one candidate affects only its row."""

    def __init__(self, machine: Machine, show: Callable[[str, Row], None]) -> None:
        self.machine, self.show = machine, show
        self.rows: dict[str, Row] = {}
        self.ready: dict[str, Candidate] = {}
        self.replays: dict[str, Step] = {}

    @contextmanager
    def losing(self, name: str) -> Iterator[None]:
        """While active, an error loses only this row."""
        try:
            yield
        except Exception as error:
            self.lose(name, error)

    def lose(self, name: str, error: Exception) -> None:
        """Write the error into the row, and free the candidate's memory.

        Raises:
            UnusableError: the error has ended the GPU's context.
        """
        row = self.rows[name]
        if isinstance(error, Unavailable):
            row["missing"] = str(error)
        elif isinstance(error, torch.OutOfMemoryError):
            row["missing"] = f"out of memory: {str(error).splitlines()[0]}"
        else:
            traceback.print_exception(error)
            row["failed"] = f"{type(error).__name__}: {error}"
        self.ready.pop(name, None)
        self.replays.pop(name, None)
        _forget(error)
        self.show(name, row)
        self.machine.free()
        require_usable(self.machine)

    def note(self, key: str, figure: Callable[[Candidate], float | None]) -> None:
        """Write a figure of each candidate into its row."""
        for name in list(self.ready):
            with self.losing(name):
                found = figure(self.ready[name])
                if found is not None:
                    self.rows[name][key] = found

    def steps(self, mode: str) -> dict[str, Step]:
        return self.replays if "graph" in mode else {name: made.step for name, made in self.ready.items()}


def _forget(error: BaseException | None) -> None:
    """Empty the frames of an error's traceback: they hold tensors while the error is handled."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _prepare(build: Callable[[], Candidate], exact: Mapping[str, Tensor]) -> tuple[Candidate, dict[str, float]]:
    """The candidate and its errors."""
    candidate = build()
    errors = rms_error(candidate.results(), dict(exact)) if exact else {}
    candidate.step()  # the first step compiles and allocates; it is not measured
    return candidate, errors


def _judge(errors: Mapping[str, dict[str, float]], name: str, baseline: str, exact: Mapping[str, Tensor]) -> Row:
    """A row's errors against fp64; empty without exact results or without a baseline."""
    if not exact or baseline not in errors:
        return {}
    worst, where = worst_ratio(errors[name], errors[baseline], dict(exact))
    return {
        "error": max(error for key, error in errors[name].items() if not key.startswith("grad.")),
        "worst_error_over_eager": worst, "worst_tensor": where, "correct": worst <= 2,
    }  # fmt: skip


def _time(group: _Group, baseline: str, samples: int, seconds: float, kind_of_device: str) -> None:
    """Write every row's times: as launched; on a GPU also with a cold L2, and both as a graph."""
    machine, rows, each = group.machine, group.rows, SAMPLE_SECONDS[kind_of_device]

    def measure(mode: str, elapsed: Elapsed, share: float, sample_seconds: float) -> None:
        found = interleave(elapsed, group.steps(mode), samples, share * seconds, sample_seconds, group.lose)
        _write(rows, baseline, mode, found)

    if kind_of_device == "cpu":
        return measure("", machine.elapsed_ms, 1.0, each)
    measure("", machine.elapsed_ms, 1 / 3, each)
    measure("cold_", cold(machine), 1 / 6, 0.0)
    pool = machine.graph_pool()
    for name in group.ready:
        try:
            group.replays[name] = machine.capture(group.ready[name].step, pool)
        except RuntimeError as error:
            require_usable(machine)  # a kernel that faulted is another case than a step that cannot be captured
            rows[name]["no_graph"] = (str(error).splitlines() or [type(error).__name__])[0]
            pool = machine.graph_pool()
    measure("graph_", machine.elapsed_ms, 1 / 3, each)
    measure("graph_cold_", cold(machine), 1 / 6, 0.0)
    return None


def _write(rows: Mapping[str, Row], baseline: str, mode: str, seen: Mapping[str, list[float]]) -> None:
    for name, values in seen.items():
        spread, row = Spread.of(values), rows[name]
        row |= {
            f"{mode}median_ms": spread.median, f"{mode}spread_ms": [spread.low, spread.high], f"{mode}all_ms": values,
        }  # fmt: skip
        if baseline in seen and row.get("correct", True):
            ratio = speedups(seen[baseline], values)
            row |= {f"{mode}speedup": ratio.median, f"{mode}speedup_spread": [ratio.low, ratio.high]}


def _share_memory(rows: Mapping[str, Row], baseline: str) -> None:
    first = rows[baseline]
    for key, share in (("peak_mib", "peak_share"), ("above_mib", "above_share")):
        for row in rows.values():
            if first.get(key) and key in row:
                row[share] = row[key] / first[key]


def worst_ratio(errors: dict[str, float], baseline: dict[str, float], exact: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error relative to the baseline's of the same tensor, and that tensor's name.

    The baseline's error counts as at least 2^-25 of the tensor's largest value. This is a quarter of a unit in fp32's
    last place; no arithmetic can be expected to be better. A NaN counts as infinitely wrong.
    """
    ratios = {}
    for name, error in errors.items():
        allowed = max(baseline[name], 2**-25 * float(exact[name].abs().max()))
        if error != error or (error and not allowed):
            ratios[name] = float("inf")
        else:
            ratios[name] = error / allowed if allowed else 0.0
    worst = max(ratios, key=ratios.__getitem__)
    return ratios[worst], worst
