"""The picture of measured speed-ups: for every group our row and the fastest exact row without our kernels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variants import is_ours

from cast_kernels.gpu.rows import Row

_OURS, _THEIRS, _INK, _LINE = "#0b6e99", "#8a8a8a", "#57606a", "#d0d7de"

#: Ticks of the axis, which is logarithmic.
_NARROW, _WIDE = (0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7), (1, 1.5, 2, 3, 5, 10, 20, 40)


def ours(row: str) -> bool:
    """Whether the row runs our kernels."""
    return is_ours(row) or row.startswith("fused=True")


def fastest(rows: Mapping[str, Row], of_ours: bool) -> tuple[str, Row] | None:
    """Name and figures of the fastest row with a speed-up, ours or others'. The baseline is one of the others."""
    found = [(name, row) for name, row in rows.items() if row.get("speedup") is not None and ours(name) == of_ours]
    return max(found, key=lambda entry: entry[1]["speedup"], default=None)


def default(rows: Mapping[str, Row]) -> Row | None:
    """Our row with the default recompute level, if it has a speed-up."""
    return next((row for name, row in rows.items() if ours(name) and row.get("speedup") is not None), None)


def speedup_plot(groups: Mapping[str, Mapping[str, Row]], machine: str, path: Path) -> None:
    """Draw one line for each group with a speed-up of ours, as an SVG file.

    Args:
        groups: title -> row -> figures, as the benchmark keeps them.
        machine: name of the measured machine.
        path: of the picture.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = {title: rows for title, rows in groups.items() if default(rows) is not None}
    style = {"svg.fonttype": "none", "svg.hashsalt": "speedups", "font.family": "sans-serif", "font.size": 10}
    with rc_context(style):
        figure = Figure(figsize=(8.4, 1.1 + 0.29 * len(shown)), layout="constrained")
        axes = figure.subplots()
        for height, rows in enumerate(reversed(shown.values())):
            _line(axes, rows, height)
        _finish(axes, [label(title) for title in reversed(shown)], machine)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None}, transparent=False)


def _line(axes: Any, rows: Mapping[str, Row], height: int) -> None:
    """Draw our default with its figure, our fastest level if it differs, and the fastest of the others."""
    mine, best, peer = default(rows), fastest(rows, True), fastest(rows, False)
    assert mine is not None
    assert best is not None
    axes.plot([1, mine["speedup"]], [height, height], color=_LINE, linewidth=5, solid_capstyle="butt", zorder=1)
    if peer is not None:
        _point(axes, peer[1], height, _THEIRS, "D", 5)
    if best[1] is not mine:
        axes.plot(best[1]["speedup"], height, "o", color=_OURS, markersize=8, fillstyle="none", zorder=2)
    _point(axes, mine, height, _OURS, "o", 8)
    axes.annotate(f"{mine['speedup']:.2f}x", (1, height), (4, 0), xycoords=("axes fraction", "data"),
                  textcoords="offset points", va="center", color=_OURS, fontweight="bold")  # fmt: skip


def _point(axes: Any, row: Row, height: int, color: str, marker: str, size: int) -> None:
    middle, (low, high) = row["speedup"], row["speedup_spread"]
    axes.errorbar(middle, height, xerr=[[middle - low], [high - middle]], fmt=marker, markersize=size, color=color,
                  elinewidth=1.5, zorder=3)  # fmt: skip


def _finish(axes: Any, names: list[str], machine: str) -> None:
    axes.axvline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xscale("log")
    end = 1.25 * axes.get_xlim()[1]
    ticks = [tick for tick in (_WIDE if end > _WIDE[1] ** 2 else _NARROW) if tick <= end]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.8, end)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.tick_params(colors=_INK, length=0)
    axes.spines[:].set_visible(False)
    axes.plot([], [], "o", color=_OURS, markersize=8, label="cast_kernels, and the spread of its rounds")
    axes.plot([], [], "o", color=_OURS, markersize=8, fillstyle="none", label="its fastest recompute level")
    axes.plot([], [], "D", color=_THEIRS, markersize=5, label="fastest exact row without us")
    axes.figure.legend(loc="outside lower right", ncols=2, frameon=False, labelcolor=_INK, fontsize=9)
    axes.figure.suptitle(f"Measured speed-up over eager PyTorch. {machine}", x=0.01, ha="left", color=_INK, fontsize=10)


def label(title: str) -> str:
    """A group's title without the part that all groups share."""
    title = re.sub(r"forward\+backward", "forward + backward", title)
    title = re.sub(
        r": (CAST-B/16|768/384|768, adapter).*|768/3072, adapter 192, 1568 rows, |768, 12 heads, adapter 192, ",
        "",
        title,
    )
    return title.replace("model ", "CAST-B/16 ").replace("bcast", "B-CAST")
