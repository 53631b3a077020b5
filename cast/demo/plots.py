"""The report's pictures, as SVG text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from cast.demo.study import MODELS, Outcome
from cast.demo.timing import StepTimes
from cast.evaluation.report.plots import contours, new_figure, plain, svg
from cast.ground.optional import require

#: One colour per model, distinct for readers who confuse red and green.
COLOURS = {"spatial": "#0072b2", "temporal": "#e69f00", "ensemble": "#666666", "cast": "#b5179e"}
_MARKERS = {"spatial": "s", "temporal": "^", "ensemble": "D", "cast": "o"}
_TITLES = {"spatial": "spatial alone", "temporal": "temporal alone", "ensemble": "ensemble", "cast": "CAST"}


def balance(outcomes: Sequence[Outcome]) -> str:
    """Verb against noun accuracy of every model and seed, with lines of equal harmonic mean."""
    figure, axes = new_figure(5.2, 4.6)
    contours(axes, (0, 100), (0, 100))
    for model in MODELS:
        nouns = [outcome.metrics[model]["noun"] for outcome in outcomes]
        verbs = [outcome.metrics[model]["verb"] for outcome in outcomes]
        axes.scatter(
            nouns, verbs, s=60, color=COLOURS[model], marker=_MARKERS[model], edgecolors="white", zorder=3,
            label=_TITLES[model],
        )  # fmt: skip
    axes.legend(fontsize=9, framealpha=1, edgecolor="none", loc="lower right")
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="noun accuracy, %", ylabel="verb accuracy, %", aspect="equal")
    return svg(figure)


def curves(outcome: Outcome) -> str:
    """Loss and accuracy by epoch of one seed's trainings."""
    plt = require("matplotlib.pyplot", "demo")
    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    for stage, colour in (("ensemble", COLOURS["ensemble"]), ("cast", COLOURS["cast"])):
        history = outcome.curves[stage]
        epochs = [entry["epoch"] for entry in history]
        loss.plot(epochs, _column(history, "loss"), color=colour, marker=".", label=_TITLES[stage])
        for head, style in (("verb", "-"), ("noun", "--")):
            label = f"{_TITLES[stage]}, {head}"
            accuracy.plot(epochs, _column(history, f"val {head}"), style, color=colour, marker=".", label=label)
    loss.set(xlabel="epoch", ylabel="training loss (verb + noun)", ylim=(0, None))
    accuracy.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 100))
    for axes in (loss, accuracy):
        axes.legend(frameon=False, fontsize=8)
        plain(axes)
    return svg(figure)


def expert_curves(outcome: Outcome) -> str:
    """Training accuracy of the two experts by epoch."""
    figure, axes = new_figure(4.6, 3.2)
    for stage, head, model in (("spatial expert", "noun", "spatial"), ("temporal expert", "verb", "temporal")):
        history = outcome.curves[stage]
        label, epochs = f"{stage}, {head}", [entry["epoch"] for entry in history]
        axes.plot(epochs, _column(history, head), color=COLOURS[model], marker=".", label=label)
    axes.set(xlabel="epoch", ylabel="training accuracy, %", ylim=(0, 100))
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def steps(times: StepTimes) -> str:
    """Every measured training step, fused and eager, with the medians."""
    figure, axes = new_figure(4.6, 3.2)
    for row, (name, values) in enumerate((("eager", times.eager), ("fused", times.fused))):
        axes.barh(row, statistics.median(values), height=0.5, color="#cccccc" if name == "eager" else COLOURS["cast"])
        axes.plot(values, [row] * len(values), "|", color="#222222", markersize=10)
    axes.set(yticks=(0, 1), yticklabels=("eager", "fused"), xlabel="milliseconds a training step", xlim=(0, None))
    return svg(figure)


def blank() -> str:
    """An empty picture, to measure the time of one."""
    return svg(new_figure(4.6, 3.2)[0])


def _column(history: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [entry[name] for entry in history]
