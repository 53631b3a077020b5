"""Class-wise F1, and confusions of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cast.evaluation.predictions import Predictions
from cast.evaluation.report import plots
from cast.evaluation.report.html import table
from cast.evaluation.summary import f1_gains, head_f1, matrix, ordered

#: Up to this number all classes are drawn; of more, only the two ends.
_ALL = 40
#: Classes drawn at either end.
_ENDS = 15
#: Confusions listed for each head.
_PAIRS = 10


def section(predictions: Predictions, baselines: Mapping[str, Predictions]) -> str:
    """F1 of the classes of every head, beside the baselines'."""
    parts = [
        f"<p>F1 is the harmonic mean of precision and recall. Bars are {escape(predictions.model)}, markers the "
        "baselines.</p>"
        if baselines
        else "<p>F1 is the harmonic mean of precision and recall.</p>"
    ]
    for head in ordered(predictions.probabilities):
        able = {name: baseline for name, baseline in baselines.items() if head in baseline.probabilities}
        parts.append(f"<h3>{escape(head.capitalize())}</h3>{_head(predictions, able, head)}")
    return "\n".join(parts)


def _head(predictions: Predictions, baselines: Mapping[str, Predictions], head: str) -> str:
    names, own = predictions.classes[head], head_f1(predictions, head)
    others = {name: head_f1(baseline, head).f1.tolist() for name, baseline in baselines.items()}
    gains = {name: f1_gains(predictions, baseline, head).tolist() for name, baseline in baselines.items()}
    present = [index for index in range(len(names)) if own.support[index] > 0]
    rank = _rank(present, gains, own.f1.tolist())
    f1, support = own.f1.tolist(), own.support.tolist()
    parts = []
    if len(present) > _ALL:
        if gains:
            parts.append(plots.sorted_gains(gains))
        parts.append(f'<p class="note">The {_ENDS} classes at either end of {len(present)}, {_order(gains)}.</p>')
        drawn: list[int | None] = [*rank[:_ENDS], None, *rank[-_ENDS:]]
    else:
        parts.append(f'<p class="note">All {len(present)} classes with videos, {_order(gains)}.</p>')
        drawn = [*rank]
    rows = [
        plots.Bar("⋯", math.nan, {})  # the classes between the two ends
        if i is None
        else plots.Bar(names[i], f1[i], {name: values[i] for name, values in others.items()})
        for i in drawn
    ]
    parts.append(plots.bars(rows, predictions.model, "F1, %"))
    parts.append(f"<details><summary>All {len(present)} classes as a table</summary>")
    cells = [
        ("", [escape(names[i]), str(support[i]), f"{f1[i]:.1f}", *(f"{g[i]:+.1f}" for g in gains.values())])
        for i in rank
    ]
    head_cells = ["Class", "Videos", "F1, %", *(f"over {escape(name)}" for name in gains)]
    return "\n".join([*parts, table(head_cells, cells), "</details>"])


def _rank(present: Sequence[int], gains: Mapping[str, Sequence[float]], f1: Sequence[float]) -> list[int]:
    """Classes sorted by the mean gain over the baselines, or by F1 if there are none; largest first."""

    def figure(index: int) -> float:
        values = [values[index] for values in gains.values() if not math.isnan(values[index])]
        return sum(values) / len(values) if values else f1[index]

    return sorted(present, key=lambda index: (-figure(index), index))


def _order(gains: Mapping[str, Any]) -> str:
    return "most improved over the baselines first" if gains else "best first"


def confusions(predictions: Predictions, summary: Mapping[str, Any]) -> str:
    """The most frequent mistakes of every head, and the whole matrix if it is small enough to read."""
    parts = []
    for head in ordered(predictions.probabilities):
        pairs = summary["confusions"][head][:_PAIRS]
        if not pairs:
            continue
        rows = [("", [escape(p["truth"]), escape(p["guess"]), str(p["count"]), f"{p['share']:.0f} %"]) for p in pairs]
        listed = table(["Truth", "Taken for", "Videos", "of the class"], rows, "names")
        names = predictions.classes[head]
        drawn = ""
        if len(names) <= _ALL:
            counts = matrix(predictions, head).double()
            shares = 100 * counts / counts.sum(1, keepdim=True)  # 0 / 0 where a class has no videos
            label = "truth, % of its videos" + (" (grey: none)" if shares.isnan().any() else "")
            drawn = plots.heat(shares.numpy(), "guess", label, names, 3.6 + 0.06 * len(names))
        parts.append(f'<h3>{escape(head.capitalize())}</h3><div class="pair"><div>{listed}</div>{drawn}</div>')
    return "\n".join(parts)
