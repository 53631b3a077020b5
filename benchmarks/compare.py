"""One group of a benchmark: candidates that compute the same thing, checked against fp64, then timed in turn."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from groups import Candidate, Work
from measure import Unavailable, rms_error, time_limit
from torch import Tensor

from cast_kernels.gpu.machine import Machine, Step, require_usable
from cast_kernels.gpu.timing import Spread, cold, interleave, speedups

#: Seconds that one candidate may take to be built, compiled and checked.
PREPARE_SECONDS = 300.0
#: A sample repeats its call until so many seconds have passed: on a CPU enough for its scheduler's turns, on a GPU
#: enough to hide the first launch and the events' own time.
SAMPLE_SECONDS = {"cpu": 0.15, "cuda": 2e-3}

Row = dict[str, Any]


def compare(
    machine: Machine, work: Work, names: Sequence[str], seconds: float, kind_of_device: str,
    show: Callable[[str, Row], None] = lambda name, row: None,
) -> dict[str, Row]:  # fmt: skip
    """Rows by name, in the order of `names`.

    A row has speed-ups over the first, the baseline, only if each of its results is within twice the baseline's error.
    A candidate that cannot run here is a row that says why ("missing"); one that raises is a row that says what
    ("failed"), and the others are measured all the same.

    Args:
        machine: where they run.
        work: what is measured.
        names: rows of it, the baseline first.
        seconds: left for all of it.
        kind_of_device: "cpu", or "cuda", whose rows are also timed with a cold L2 and as graphs.
        show: is told each row as far as it is known, before anything that may end the process.

    Raises:
        UnusableError: a fault has ended the GPU's context.
    """
    end = time.monotonic() + seconds
    exact = work.exact() if work.exact else {}
    rows: dict[str, Row] = {}
    ready: dict[str, Candidate] = {}
    errors: dict[str, dict[str, float]] = {}
    torch._dynamo.reset()  # a group compiles a function once: what another group compiled would count against its limit
    for name in names:
        with_limit = min(PREPARE_SECONDS, max(end - time.monotonic(), 1.0))
        show(name, {"failed": "the process ended while this row was built and checked"})
        machine.computed()
        made = _prepare(name, work.builders[name], exact, with_limit)
        if isinstance(made, (str, Exception)):
            rows[name] = {"missing": made} if isinstance(made, str) else {"failed": f"{type(made).__name__}: {made}"}
            show(name, rows[name])
            require_usable(machine)
            continue
        ready[name], errors[name] = made
        rows[name] = _judge(errors, name, names[0], exact) if machine.computed() else {}
        rows[name] |= ready[name].figures
        show(name, rows[name])
    gc.collect()
    if kind_of_device == "cuda":
        for name, candidate in ready.items():
            rows[name]["peak_mib"] = machine.peak_bytes(candidate.step) / 2**20
    steps = {name: candidate.step for name, candidate in ready.items()}
    if not work.memory_alone:
        _time(machine, steps, rows, names[0], work.samples, min(work.seconds, end - time.monotonic()), kind_of_device)
    for name, candidate in ready.items():
        if candidate.kept_bytes is not None:
            rows[name]["kept_mib"] = candidate.kept_bytes() / 2**20
        if machine.stand_in:
            rows[name]["stand_in"] = machine.stand_in
        if name in work.predicted:
            rows[name]["predicted_ms"] = work.predicted[name]
    if work.memory_alone:
        _share_memory(rows, names[0])
    return rows


def _prepare(
    name: str, build: Callable[[], Candidate], exact: Mapping[str, Tensor], seconds: float
) -> tuple[Candidate, dict[str, float]] | str | Exception:
    """The candidate and its errors; or why it cannot run here; or what it raised."""
    try:
        with time_limit(seconds, f"building, compiling and checking {name}"):
            candidate = build()
            if not exact:
                candidate.step()
                return candidate, {}
            return candidate, rms_error(candidate.results(), dict(exact))
    except Unavailable as reason:
        return str(reason)
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:  # the other rows are as good as before
        traceback.print_exc()
        return error


def _judge(errors: Mapping[str, dict[str, float]], name: str, baseline: str, exact: Mapping[str, Tensor]) -> Row:
    """What fp64 says of a row; nothing where it was not asked, or where there is no baseline."""
    if not exact or baseline not in errors:
        return {}
    worst, where = worst_ratio(errors[name], errors[baseline], dict(exact))
    return {
        "error": max(error for key, error in errors[name].items() if not key.startswith("grad.")),
        "worst_error_over_eager": worst, "worst_tensor": where, "correct": worst <= 2,
    }  # fmt: skip


def _time(
    machine: Machine, steps: Mapping[str, Step], rows: Mapping[str, Row], baseline: str, samples: int, seconds: float,
    kind_of_device: str,
) -> None:  # fmt: skip
    """Write every row's times into it: as launched; on a GPU with a cold L2 too, and the same as a graph."""
    each = SAMPLE_SECONDS[kind_of_device]
    if kind_of_device == "cpu":
        return _write(rows, baseline, "", interleave(machine.elapsed_ms, steps, samples, seconds, each))
    _write(rows, baseline, "", interleave(machine.elapsed_ms, steps, samples, seconds / 3, each))
    _write(rows, baseline, "cold_", interleave(cold(machine), steps, samples, seconds / 6, 0.0))
    replays: dict[str, Step] = {}
    pool = machine.graph_pool()
    for name, step in steps.items():
        try:
            replays[name] = machine.capture(step, pool)
        except RuntimeError as error:
            require_usable(machine)  # a kernel that faulted is no step that cannot be captured
            rows[name]["no_graph"] = (str(error).splitlines() or [type(error).__name__])[0]
            pool = machine.graph_pool()
    _write(rows, baseline, "graph_", interleave(machine.elapsed_ms, replays, samples, seconds / 3, each))
    _write(rows, baseline, "graph_cold_", interleave(cold(machine), replays, samples, seconds / 6, 0.0))
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

    Below a quarter of a unit in fp32's last place of a tensor's largest value no arithmetic can be asked to be better,
    so the baseline's error counts as at least that. A NaN is infinitely wrong.
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
