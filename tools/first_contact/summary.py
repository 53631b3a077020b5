"""The results as Markdown, whole at every moment of the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from first_contact.running import Found

EMULATED = "**Emulated: no figure here is a measurement.** It shows that the way to the GPU is whole, nothing else."

RIGHT, WRONG, INCOMPLETE = 0, 1, 3
_VERDICTS = {
    RIGHT: "Everything ran and is right.",
    WRONG: "FAIL: something is wrong or broke; see below.",
    INCOMPLETE: "What ran is right; the time was over before the rest.",
}


def status(found: Sequence[Found], skipped: Sequence[str]) -> int:
    """The exit status: 1 if something is wrong or broke, 3 if only the time was too short, else 0."""
    if any(stage.wrong or stage.broken for stage in found):
        return WRONG
    return INCOMPLETE if skipped or any(stage.late for stage in found) else RIGHT


def markdown(
    found: Sequence[Found], skipped: Sequence[str], seconds: float, emulated: bool, cut: Mapping[str, str]
) -> str:
    """The whole document.

    Args:
        found: begun stages; the last may still run.
        skipped: names of stages that were not begun.
        seconds: since the start.
        emulated: whether there was no GPU.
        cut: file -> the reason why it is incomplete.
    """
    lines = ["# First contact with a GPU", "", *([EMULATED, ""] if emulated else [])]
    lines += [f"{_VERDICTS[status(found, skipped)]} {seconds:.0f} s.", "", "## Stages", ""]
    lines += _table(
        ("stage", "what", "right", "wrong", "neither", "not begun", "seconds", "ended early"),
        [_stage(stage) for stage in found] + [(name, "", "", "", "", "", "", "not begun") for name in skipped],
    )
    wrong = [(stage.stage, row["row"], row.get("why_not", "")) for stage in found for row in stage.wrong]
    if wrong:
        lines += ["", "## Wrong", "", *_table(("stage", "row", "why"), wrong)]
    for stage in found:
        if stage.rows:
            columns = list(dict.fromkeys(key for row in stage.rows for key in row))
            cells = [[row.get(key, "") for key in columns] for row in stage.rows]
            lines += ["", f"## {stage.stage}: {stage.about}", "", *_table(columns, cells)]
    if cut:
        lines += ["", "## Files that do not hold everything", "", *_table(("file", "why"), cut.items())]
    return "\n".join(lines) + "\n"


def _stage(stage: Found) -> tuple[Any, ...]:
    right = sum(row.get("ok") is True for row in stage.rows)
    neither = len(stage.rows) - right - len(stage.wrong)
    counts = (right, len(stage.wrong), neither, len(stage.missing))
    return (stage.stage, stage.about, *counts, f"{stage.seconds:.0f}", stage.ended)


def _table(headings: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(_cell(value) for value in line)} |" for line in lines]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return " ".join(str("" if value is None else value).split()).replace("|", "\\|")[:400]
