"""A row of a benchmark as text: the terminal's tables and the report of `gpu-check` have the same columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: The figures of one variant, by name; `benchmarks/compare.py` fills it in.
Row = dict[str, Any]


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else form.format(row[key])


def _around(text: Callable[[float], str], row: Row, key: str, spread: str) -> str:
    """A median with its spread: no figure is shown without one."""
    low, high = map(text, row[spread])
    return f"{text(row[key])} ({low}..{high})"


def _time(mode: str) -> Callable[[Row], str]:
    """Milliseconds in one of the :data:`MODES`."""

    def text(ms: float) -> str:
        return f"{ms:.4g}" if ms < 9999.5 else f"{ms:.0f}"

    return lambda row: (
        "" if f"{mode}median_ms" not in row else _around(text, row, f"{mode}median_ms", f"{mode}spread_ms")
    )


def speedup(row: Row, mode: str = "") -> str:
    """The speed-up over the first row, with its spread; the row must have one."""
    return _around("{:.2f}".format, row, f"{mode}speedup", f"{mode}speedup_spread")


def _speedup(mode: str) -> Callable[[Row], str]:
    """The speed-up over the first row; a timed row that is not exact enough has none."""

    def cell(row: Row) -> str:
        if row.get(f"{mode}speedup") is None:
            return "inexact" if row.get("correct") is False and f"{mode}median_ms" in row else ""
        return speedup(row, mode)

    return cell


#: Prefixes of the figures' keys for each way to time a row, in the order of the columns.
MODES = ("", "cold_", "graph_", "graph_cold_")


def _samples(row: Row) -> str:
    """The number of samples of each way, in the order of the columns."""
    return ", ".join(str(len(row[f"{mode}all_ms"])) for mode in MODES if f"{mode}all_ms" in row)


#: Header -> the cell of a row, or "" if the row has no such figure. A column without cells is left out.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "ms (spread)": _time(""),
    "speed-up (spread)": _speedup(""),
    "cold L2 ms (spread)": _time("cold_"),
    "graph ms (spread)": _time("graph_"),
    "graph speed-up (spread)": _speedup("graph_"),
    "graph, cold L2 ms (spread)": _time("graph_cold_"),
    "predicted ms": _number("predicted_ms", "{:.4g}"),
    "clips/s": _number("clips_per_second", "{:.1f}"),
    "GFLOP/s": lambda row: "" if "of_ceiling" in row else _number("gflops", "{:.0f}")(row),
    "of ceiling": _number("of_ceiling", "{:.0%}"),
    "of copy": _number("of_copy", "{:.0%}"),
    "kept MiB": _number("kept_mib", "{:.1f}"),
    "peak MiB": _number("peak_mib", "{:.0f}"),
    "of first row": _number("peak_share", "{:.0%}"),
    "before the first step MiB": _number("before_mib", "{:.0f}"),
    "peak above that MiB": _number("above_mib", "{:.0f}"),
    "of first row's": _number("above_share", "{:.0%}"),
    "error / eager's": _number("worst_error_over_eager", "{:.2f}"),
    "samples": _samples,
}

_NOTES = (
    "samples: of each column of ms, from left to right",
    "ms: the median, with the middle half of the samples around it, or all of them where there are fewer than eight",
    "speed-up over the first row: the median of the rounds' ratios, with their spread; a round times each row once",
    "error / eager's: a tensor's root mean square error against fp64 over the first row's or a floor, the largest",
    "inexact: an error against fp64 is more than twice that of the first row, so no speed-up",
    "of ceiling, of copy: shares of the measured rates below, by the graph's time where there is one",
)
_STAND_IN = "stand-in: an emulated device or library took the row's place; nothing about it was measured"


def notes(groups: Mapping[str, Mapping[str, Row]]) -> tuple[str, ...]:
    """Notes for readers of the tables."""
    stand_in = any("stand_in" in row for rows in groups.values() for row in rows.values())
    return (*_NOTES, _STAND_IN) if stand_in else _NOTES


#: The reason of a missing row begins so if its group was not begun in time.
NOT_BEGUN = "not begun"


def not_begun(row: Row) -> bool:
    """Whether the row's group was not begun in time."""
    return str(row.get("missing", "")).startswith(NOT_BEGUN)


def reason(row: Row) -> str:
    """Why figures are missing, "" if none are."""
    found = [f"{why.replace('_', ' ')}: {row[why]}" for why in ("failed", "missing", "no_graph") if why in row]
    return "; ".join(found)


def cells(rows: Mapping[str, Row]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line of cells for each row. A stand-in's row shows no figure."""
    shown = {header: cell for header, cell in COLUMNS.items() if any(cell(row) for row in rows.values())}
    lines = []
    for name, row in rows.items():
        line = [cell(row) for cell in shown.values()] or [""]
        if "stand_in" in row:
            line = ["stand-in" if cell else "" for cell in line]
        for why in ("missing", "failed"):
            if why in row:
                line[0] = why
        lines.append([name, *line])
    return ["variant", *(shown or [""])], lines
