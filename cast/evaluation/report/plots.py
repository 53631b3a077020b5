"""The report's diagrams, as SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cast.ground.optional import require

#: Colours of models, distinct for readers who confuse red and green; the first is the evaluated model's.
COLOURS = ("#b5179e", "#0072b2", "#e69f00", "#666666", "#009e73", "#d55e00")
_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Point:
    """A model in the balanced-understanding plot: accuracies in percent."""

    name: str
    space: float
    time: float


def balance(
    points: Sequence[Point], reference: Sequence[Point], labels: tuple[str, str], lines: Sequence[Point] = ()
) -> str:
    """Accuracy on the temporal task over accuracy on the spatial one, with lines of equal harmonic mean.

    Args:
        points: the evaluated models; the report's model comes first.
        reference: published methods, drawn small and grey.
        labels: names of the two axes, x first.
        lines: results with one coordinate; the other one is NaN.
    """
    figure, axes = new_figure(6.4, 5.6)
    everything = [*points, *reference, *lines]
    low_x, high_x = _range([point.space for point in everything])
    low_y, high_y = _range([point.time for point in everything])
    values = contours(axes, (low_x, high_x), (low_y, high_y))
    for point in reference:
        axes.plot(point.space, point.time, "o", color="#9a9a9a", markersize=4, zorder=2)
    for number, point in enumerate(points):
        axes.scatter(
            point.space, point.time, s=80, color=COLOURS[number % 6], marker=_MARKERS[number % 6],
            edgecolors="white", zorder=4, clip_on=False,  # not cut off at an axis
        )  # fmt: skip
    for point in lines:
        draw = axes.axhline if math.isnan(point.space) else axes.axvline
        value = point.time if math.isnan(point.space) else point.space
        draw(value, color=COLOURS[0], linewidth=1.4, zorder=3, label=f"{plain_text(point.name)}: {value:.1f} %")
    if lines:
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    axes.set(xlim=(low_x, high_x), ylim=(low_y, high_y), xlabel=labels[0], ylabel=labels[1])
    named = [(p, COLOURS[n % 6], 10) for n, p in enumerate(points)] + [(p, "#6b6b6b", 8) for p in reference]
    _annotate(figure, axes, named, values)
    return svg(figure)


def contours(axes: Any, x: tuple[float, float], y: tuple[float, float]) -> list[Any]:
    """Draw about eight grey lines of equal harmonic mean; returns the texts of their values."""
    grid_x, grid_y = np.meshgrid(np.linspace(max(x[0], 0.1), x[1], 200), np.linspace(max(y[0], 0.1), y[1], 200))
    mean = 2 * grid_x * grid_y / (grid_x + grid_y)
    step = next((step for step in (1, 2, 5, 10) if (mean.max() - mean.min()) / step <= 10), 20)
    levels = np.arange(math.ceil(mean.min() / step) * step, mean.max(), step)
    drawn = axes.contour(grid_x, grid_y, mean, levels=levels, colors="#d8d8d8", linewidths=0.8)
    return list(axes.clabel(drawn, fontsize=7, fmt="%d", colors="#999999") or ())


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits with room for names around the values; NaN is ignored."""
    known = [value for value in values if not math.isnan(value)]
    room = max(3.0, 0.12 * (max(known) - min(known)))
    return max(0.0, min(known) - room), min(100.0, max(known) + room)


def _annotate(figure: Any, axes: Any, named: Sequence[tuple[Point, str, int]], values: Sequence[Any]) -> None:
    """Write each name beside its point, at the first of some places where it covers no other name, point or value."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    bbox = require("matplotlib.transforms", "report").Bbox
    pixels = [axes.transData.transform((point.space, point.time)) for point, _, _ in named]
    dots = [bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in pixels]
    taken = [value.get_window_extent(renderer) for value in values]
    places = [
        (7, -3, "left"), (-7, -3, "right"), (0, 7, "center"), (0, -14, "center"),
        (6, 6, "left"), (-6, 6, "right"), (6, -13, "left"), (-6, -13, "right"),
        (10, 12, "left"), (-10, 12, "right"), (10, -19, "left"), (-10, -19, "right"),
    ]  # fmt: skip
    for point, colour, size in named:
        best: tuple[int, Any, Any] | None = None
        for x, y, side in places:
            text = axes.annotate(
                plain_text(point.name), (point.space, point.time), (x, y), textcoords="offset points", ha=side,
                color=colour, fontsize=size, zorder=5,
            )  # fmt: skip
            box = text.get_window_extent(renderer).padded(1)
            covered = sum(box.overlaps(other) for other in taken)
            covered += sum(box.overlaps(dot) for dot in dots)
            covered += 3 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            if best is None or covered < best[0]:
                if best:
                    best[1].remove()
                best = covered, text, box
            else:
                text.remove()
            if not covered:
                break
        assert best is not None
        taken.append(best[2])


@dataclass(frozen=True)
class Bar:
    """A class's figure, and the same figure of other models by name; in percent."""

    name: str
    value: float
    others: Mapping[str, float]


def bars(rows: Sequence[Bar], own: str, label: str) -> str:
    """Horizontal bars of one model with a marker for each of the others, first row on top."""
    figure, axes = new_figure(8.4, 0.9 + 0.21 * len(rows))
    heights = range(len(rows), 0, -1)
    values = [0.0 if math.isnan(row.value) else row.value for row in rows]
    axes.barh(
        heights, values, height=0.62, color=COLOURS[0], alpha=0.75, label=plain_text(own)
    )  # an omitted stretch has no bar
    names = list(dict.fromkeys(name for row in rows for name in row.others))
    for number, name in enumerate(names, start=1):
        marks = [(row.others[name], height) for row, height in zip(rows, heights, strict=True) if name in row.others]
        axes.plot(
            *zip(*marks, strict=True), linestyle="", marker=_MARKERS[number % 6], color=COLOURS[number % 6],
            markersize=5, label=plain_text(name), markeredgecolor="white", markeredgewidth=0.5, clip_on=False, zorder=4,
        )  # fmt: skip
    axes.set_yticks(list(heights), [_short(row.name) for row in rows], fontsize=8)
    axes.set(xlim=(0, 100), ylim=(0.3, len(rows) + 0.7), xlabel=label)
    axes.tick_params(axis="y", length=0, pad=7)  # room for a marker at 0
    if names:
        figure.legend(loc="outside upper left", ncols=len(names) + 1, frameon=False, fontsize=8)
    return svg(figure)


def sorted_gains(gains: Mapping[str, Sequence[float]]) -> str:
    """All classes' gains over each baseline, sorted."""
    figure, axes = new_figure(8.4, 2.8)
    for number, (name, values) in enumerate(gains.items(), start=1):
        ordered = sorted((value for value in values if not math.isnan(value)), reverse=True)
        axes.step(
            range(len(ordered)), ordered, where="mid", color=COLOURS[number % 6], label=f"over {plain_text(name)}"
        )
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set(xlabel="classes, most improved first", ylabel="F1 gain, points")
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def heat(values: np.ndarray, x: str, y: str, names: Sequence[str] | None = None, size: float = 2.2) -> str:
    """A matrix as colours, NaN in grey, with `names` on both axes if given."""
    figure, axes = new_figure(size, size)
    image = axes.imshow(values, cmap="magma", vmin=0, vmax=max(float(np.nanmax(values)), 1e-9), aspect="equal")
    axes.set_facecolor("#d4d4d4")
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    if names:
        short = [_short(name) for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), short, fontsize=7)
    else:
        ticks = range(0, len(values), max(1, len(values) // 4))
        axes.set_xticks(ticks, [str(tick + 1) for tick in ticks], fontsize=7)
        axes.set_yticks(ticks, [str(tick + 1) for tick in ticks], fontsize=7)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return svg(figure)


def lines(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, percent: bool = False) -> str:
    """Curves by name, each (x values, y values)."""
    figure, axes = new_figure(4.8, 3.4)
    for number, (name, (across, up)) in enumerate(series.items()):
        style = ("-", "--", ":")[number // 6 % 3]
        marker = "." if len(across) <= 60 else ""
        axes.plot(across, up, style, marker=marker, color=COLOURS[number % 6], label=plain_text(name), linewidth=1.3)
    axes.set(xlabel=x, ylabel=y, ylim=(0, 100) if percent else None)
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def _short(name: str, length: int = 28) -> str:
    return plain_text(name if len(name) <= length else name[: length - 1] + "…")


def plain_text(name: str) -> str:
    """A name from data, escaped for matplotlib: `$` must begin no formula, and a leading `_` must hide nothing."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of inches with one plain pair of axes."""
    plt = require("matplotlib.pyplot", "report")
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    plain(axes)
    return figure, axes


def plain(axes: Any) -> None:
    """Remove the lines at the top and on the right."""
    axes.spines[["top", "right"]].set_visible(False)


def svg(figure: Any) -> str:
    """The figure as an `<svg>` element; the figure is closed."""
    matplotlib, text = require("matplotlib", "report"), io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "cast"}):  # equal figures give equal bytes
        figure.savefig(text, format="svg", metadata={"Date": None})
    require("matplotlib.pyplot", "report").close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
