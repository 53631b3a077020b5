"""One group of a benchmark: candidates that compute the same thing, checked against fp64, then timed in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import Unavailable, interleave, rms_error, time_limit
from torch import Tensor

from cast_kernels import _C

#: Seconds that one candidate may take to be built, compiled and checked.
PREPARE_SECONDS = 300.0


@dataclass
class Candidate:
    """One way to do a group's work.

    Args:
        step: what is timed.
        results: what is compared with fp64, by name.
        kept_mib: MiB that autograd keeps from forward to backward, where there is a backward.
    """

    step: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]
    kept_mib: Callable[[], float] | None = None


def compare(
    builders: dict[str, Callable[[], Candidate]],
    exact: dict[str, Tensor],
    baseline: str,
    flops: int,
    samples: int,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """Rows by name, in the builders' order.

    A row has a speed-up over the baseline only if each of its results is within twice the baseline's error. A
    candidate that cannot be built is a row that says why.

    Args:
        builders: name -> how to make the candidate; each holds memory only while its group is measured.
        exact: the results in fp64.
        baseline: a name in `builders`; the group cannot do without it.
        flops: floating-point operations of one step.
        samples, seconds: as :func:`measure.interleave` takes them.
    """
    ready: dict[str, Candidate] = {}
    errors: dict[str, dict[str, float]] = {}
    missing: dict[str, dict[str, Any]] = {}
    for name, build in builders.items():
        try:
            with time_limit(PREPARE_SECONDS, f"building, compiling and checking {name}"):
                candidate = build()
                errors[name] = rms_error(candidate.results(), exact)
            ready[name] = candidate
        except Unavailable as reason:
            if name == baseline:
                raise
            missing[name] = {"missing": str(reason)}
    # Before and after, the best of several: a neighbour that takes a core for a moment must not lower the ceiling.
    ceilings = [measure_ceiling() for _ in range(3)]
    gc.collect()
    times = interleave({name: candidate.step for name, candidate in ready.items()}, samples, seconds)
    ceiling = max(ceilings + [measure_ceiling() for _ in range(3)])
    rows = {}
    for name, candidate in ready.items():
        median = times[name]["median_ms"]
        worst, where = worst_ratio(errors[name], errors[baseline], exact)
        rows[name] = times[name] | {
            "speedup": times[baseline]["median_ms"] / median if worst <= 2 else None,
            "gflops": flops / median / 1e6,
            "of_ceiling": flops / median / 1e6 / ceiling,
            "ceiling_gflops": ceiling,
            "kept_mib": candidate.kept_mib() if candidate.kept_mib is not None else None,
            "error": max(error for key, error in errors[name].items() if not key.startswith("grad.")),
            "worst_error_over_eager": worst,
            "worst_tensor": where,
            "correct": worst <= 2,
        }
    return {name: missing.get(name) or rows[name] for name in builders}


def measure_ceiling() -> float:
    """GFLOP/s of fp32 multiply-adds on as many threads as torch uses."""
    return float(_C.measure_fma_ceiling(torch.get_num_threads(), 0.2))


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
