"""A study's results: accuracies over the seeds beside the paper's, and the verdicts on the paper's orderings."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cast.study.tables import StudyPlan, Table

METRICS = ("verb", "noun", "action")
#: (model, seed) -> accuracies in percent.
Runs = Mapping[tuple[str, int], Mapping[str, float]]


def table_results(table: Table, runs: Runs, seeds: Sequence[int], plan: StudyPlan) -> dict[str, Any]:
    """One table: rows with the paper's figures and ours, and the orderings."""
    rows = []
    for row in table.rows:
        own = [runs[row.model, seed] for seed in seeds if (row.model, seed) in runs]
        entry: dict[str, Any] = {"label": row.label, "model": row.model}
        entry["paper"] = None if row.paper is None else dict(zip(METRICS, row.paper, strict=True))
        if own:
            entry["runs"] = [{m: round(run[m], 2) for m in METRICS} for run in own]
            entry["mean"] = {m: round(statistics.fmean(run[m] for run in own), 2) for m in METRICS}
            entry["spread"] = {m: round(_deviation([run[m] for run in own]), 2) for m in METRICS}
        else:
            entry["not_run"] = plan.models[row.model].miniature
        rows.append(entry)
    return {"title": table.title, "source": table.source, "rows": rows, "orderings": orderings(rows)}


def orderings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every pair of rows with different figures in the paper, and whether the miniature orders them in the same way.

    A verdict compares seed by seed: `holds` if every seed agrees with the paper, `reversed` if every seed contradicts
    it, else `undecided`. Each of the paper's own figures comes from one training.
    """
    found = []
    usable = [row for row in rows if row["paper"] is not None and "runs" in row]
    for metric, (first, second) in itertools.product(METRICS, itertools.combinations(usable, 2)):
        published = first["paper"][metric] - second["paper"][metric]
        if not published:
            continue
        better, worse = (first, second) if published > 0 else (second, first)
        gains = [b[metric] - w[metric] for b, w in zip(better["runs"], worse["runs"], strict=True)]
        verdict = "holds" if min(gains) > 0 else "reversed" if max(gains) < 0 else "undecided"
        found.append(
            {
                "metric": metric,
                "better": better["label"],
                "worse": worse["label"],
                "paper": round(abs(published), 2),
                "gain": round(statistics.fmean(gains), 2),
                "by_seed": [round(gain, 2) for gain in gains],
                "verdict": verdict,
            }
        )
    return found


def tally(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """metric -> verdict -> number of orderings."""
    verdicts = ("holds", "undecided", "reversed")
    return {
        metric: {v: sum(o["metric"] == metric and o["verdict"] == v for o in found) for v in verdicts}
        for metric in METRICS
    }


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
