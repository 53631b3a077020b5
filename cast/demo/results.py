"""The content of `metrics.json`: the four models' accuracies, over one seed or several."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from cast.demo.study import MODELS, Outcome

METRICS = ("verb", "noun", "action", "harmonic_mean")


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All figures in percent.

    The four models' entries are means over the seeds; `spread` has their standard deviations (0 for one seed); `gain`
    is CAST minus ensemble, seed by seed. `runs` has every seed's figures. It also has both ways to build the ensemble
    (the one with the better action accuracy counts) and a sign test of the clips that only one of CAST and the ensemble
    names right.
    """
    seeds = [outcome.seed for outcome in outcomes]

    def over(model: str, metric: str) -> list[float]:
        return [outcome.metrics[model][metric] for outcome in outcomes]

    def gains(metric: str) -> dict[str, Any]:
        values = [c - e for c, e in zip(over("cast", metric), over("ensemble", metric), strict=True)]
        return {"mean": _round(statistics.fmean(values)), "by_seed": [_round(value) for value in values]}

    return {
        "seed": seeds[0] if len(seeds) == 1 else seeds,
        **{model: {m: _round(statistics.fmean(over(model, m))) for m in METRICS} for model in MODELS},
        "spread": {model: {m: _round(_deviation(over(model, m))) for m in METRICS} for model in MODELS},
        "gain": {metric: gains(metric) for metric in METRICS},
        "runs": [
            {
                "seed": outcome.seed,
                **{model: _rounded(outcome.metrics[model]) for model in MODELS},
                "ensembles": {name: _rounded(figures) for name, figures in outcome.ensembles.items()},
                "only_cast_right": outcome.apart[0],
                "only_ensemble_right": outcome.apart[1],
                "chance_of_such_a_split": sign_test(*outcome.apart),
                "training_seconds": {name: _round(seconds) for name, seconds in outcome.seconds.items()},
            }
            for outcome in outcomes
        ],
    }


def sign_test(one: int, other: int) -> float:
    """The probability that a fair coin falls at least as unevenly as `one` to `other`, two-sided."""
    tosses, most = one + other, max(one, other)
    tail = sum(math.comb(tosses, heads) for heads in range(most, tosses + 1)) / 2**tosses
    return min(1.0, 2 * tail)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: _round(value) for name, value in figures.items()}


def _round(value: float) -> float:
    return round(value, 2)
