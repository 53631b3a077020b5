"""The picture of measured speed-ups: of every group our row and the fastest exact row that a user has without us."""

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
    """Name and figures of the fastest row, ours or others', that has a speed-up; the baseline is one of the others."""
    found = [(name, row) for name, row in rows.items() if row.get("speedup") is not None and ours(name) == of_ours]
    return max(found, key=lambda entry: entry[1]["speedup"], default=None)


def speedup_plot(groups: Mapping[str, Mapping[str, Row]], machine: str, path: Path) -> None:
    """Draw one line for each group with a speed-up of ours, as an SVG file.

    Args:
        groups: title -> row -> figures, as the benchmark keeps them.
        machine: whose figures they are.
        path: of the picture.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    pairs = [
        (label(title), fastest(rows, False), best)
        for title, rows in groups.items()
        if (best := fastest(rows, True)) is not None
    ]
    style = {"svg.fonttype": "none", "svg.hashsalt": "speedups", "font.family": "sans-serif", "font.size": 10}
    with rc_context(style):
        figure = Figure(figsize=(8.4, 1.1 + 0.29 * len(pairs)), layout="constrained")
        axes = figure.subplots()
        for height, (_, peer, best) in enumerate(reversed(pairs)):
            axes.plot(
                [1, best[1]["speedup"]], [height, height], color=_LINE, linewidth=5, solid_capstyle="butt", zorder=1
            )
            if peer is not None:
                _point(axes, peer[1], height, _THEIRS, "D", 5)
            _point(axes, best[1], height, _OURS, "o", 8)
            axes.annotate(f"{best[1]['speedup']:.2f}x", (best[1]["speedup_spread"][1], height), (8, 0),
                          textcoords="offset points", va="center", color=_OURS, fontweight="bold")  # fmt: skip
        _finish(axes, [name for name, _, _ in reversed(pairs)], machine)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None}, transparent=False)


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
    axes.plot([], [], "o", color=_OURS, markersize=8, label="cast_kernels, its fastest recompute level")
    axes.plot([], [], "D", color=_THEIRS, markersize=5, label="fastest exact row without us")
    axes.figure.legend(loc="outside lower right", ncols=2, frameon=False, labelcolor=_INK, fontsize=9)
    axes.figure.suptitle(f"Measured speed-up over eager PyTorch. {machine}", x=0.01, ha="left", color=_INK, fontsize=10)


def label(title: str) -> str:
    """A group's title without what all groups share."""
    title = re.sub(r"forward\+backward", "forward + backward", title)
    title = re.sub(
        r": CAST-B/16.*|: 768/384.*|768/3072, adapter 192, 1568 rows, |768, 12 heads, adapter 192, ", "", title
    )
    return title.replace("model ", "CAST-B/16 ").replace("bcast", "B-CAST")
