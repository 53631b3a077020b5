"""The results of `cast-kernels gpu-check` as tables and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from cast_kernels.evidence.model import UNCERTAINTY
from cast_kernels.evidence.prediction_report import markdown_table
from cast_kernels.gpu import order
from cast_kernels.gpu.rows import Row, cells, notes, reason

#: The GPUs that backend `cuda` has kernels for.
HOPPER = "sm_90"
#: Exit statuses of a complete run of pytest: every test passed, or some failed and their rows say so.
ENDS = (0, 1)
_TIMES = ("median_ms", "cold_median_ms", "graph_median_ms", "graph_cold_median_ms")


def is_right(entry: Mapping[str, Any]) -> bool:
    """Whether the entry is within the bound, and two runs have the same bits if they must. What was left out is no
    error.
    """
    if "left_out" in entry:
        return True
    return bool(entry["ok"]) and (bool(entry.get("same_bits_twice")) or not entry.get("bits_demanded", True))


def beside(groups: Mapping[str, Mapping[str, Row]]) -> list[dict[str, Any]]:
    """Each predicted row's best time beside its prediction, and whether it lies within the predictions' uncertainty."""
    found = []
    for group, rows in groups.items():
        for name, row in rows.items():
            times = [row[mode] for mode in _TIMES if mode in row]
            if "predicted_ms" in row and times and "stand_in" not in row:
                ratio = min(times) / row["predicted_ms"]
                found.append({
                    "group": group, "name": name, "measured_ms": min(times), "predicted_ms": row["predicted_ms"],
                    "ratio": ratio, "inside": abs(ratio - 1) <= UNCERTAINTY,
                })  # fmt: skip
    return found


def not_measured(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(group, row, why) of our rows without a figure, and of groups that were not begun in time.

    The CUDA kernels are Hopper's: on another GPU they lack nothing.
    """
    ours, cuda = "cast_kernels", order.row_of("cuda")
    hopper = found.get("device", {}).get("capability", HOPPER) == HOPPER
    return [
        (group, name, row["missing"])
        for group, rows in found["times"].get("groups", {}).items()
        for name, row in rows.items()
        if "missing" in row and name.startswith(ours) and (hopper or not name.startswith(cuda))
    ]


def verdict(found: Mapping[str, Any], passed: bool) -> str:
    """The last line."""
    if not passed:
        return "FAIL: see above; please send the report all the same"
    lacking = dict.fromkeys(group for group, *_ in not_measured(found))
    if lacking:
        return (
            f"measured rows are right; rows of ours were not measured in: {'; '.join(lacking)}; please send the report"
        )
    return "all is right; please send the report"


Section = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, headings, cells


def sections(found: Mapping[str, Any]) -> list[Section]:
    """All results as titled tables of text."""
    times = found["times"]
    summary: list[tuple[str, ...]] = [(key, str(value)) for key, value in found["device"].items()]
    summary += [(name.removesuffix("_per_s"), f"{x / 1e12:.2f} T/s") for name, x in times.get("ceilings", {}).items()]
    broken: list[Section] = []
    lines: list[tuple[str, ...]] = [("FAIL", b["section"], b["error"].replace("\n", " ")) for b in found["broken"]]
    lines += [("FAIL", name, "not finished when this was written") for name in found.get("unfinished", ())]
    lines += [("FAIL", "times", times["broken"])] if times.get("broken") else []
    if times.get("status", 0) not in ENDS:
        lines.append(("FAIL", "times", f"the benchmarks ended with exit status {times['status']}"))
    if lines:
        broken = [("ended by an error; earlier entries are below", ("", "section", "error"), lines)]
    correct = [_checked(entry) for entry in found["correctness"]]
    predicted: list[tuple[str, ...]] = [
        (p["group"], p["name"], f"{p['measured_ms']:.3f}", f"{p['predicted_ms']:.3f}", f"{p['ratio']:.2f}",
         "yes" if p["inside"] else "no")
        for p in beside(times.get("groups", {}))
    ]  # fmt: skip
    sanitizer: list[tuple[str, ...]] = [
        (s["tool"], "ok" if s["ok"] else "FAIL", s["output"].replace("\n", " ")) for s in found["sanitizer"]
    ]
    lacking: list[Section] = []
    if missing := not_measured(found):
        lacking = [("rows of ours that were not measured", ("group", "row", "why"), list(missing))]
    return [
        *broken,
        *lacking,
        ("GPU and its measured ceilings", ("", ""), summary),
        ("correctness against fp64, the worst tensor of each; at most twice eager's error",
         ("", "backend", "dtype", "case", "tensor", "rms", "eager's", "run twice"), correct),
        ("compute-sanitizer", ("tool", "", "output"), sanitizer or [("-", "", "not installed, or not asked for")]),
        *(_group(title, rows) for title, rows in times.get("groups", {}).items()),
        (f"predicted beside measured (the best way of each row); the model claims +-{UNCERTAINTY:.0%}",
         ("group", "row", "measured ms", "predicted ms", "ratio", "inside"),
         predicted or [("-", "no measured row has a prediction for this GPU", "", "", "", "")]),
    ]  # fmt: skip


def _checked(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """A line of what was checked, or why it was not."""
    about = (entry["backend"], entry["dtype"], entry["case"])
    for why, mark in (("why_not", "FAIL"), ("left_out", "left out")):
        if why in entry:
            return mark, *about, "-", "-", "-", entry[why]
    errors = (entry["worst"], f"{entry['rms']:.2e}", f"{entry['eager_rms']:.2e}")
    return "ok" if is_right(entry) else "FAIL", *about, *errors, _bits(entry)


def _bits(entry: Mapping[str, Any]) -> str:
    if entry["same_bits_twice"]:
        return "same"
    return "DIFFERENT" if entry.get("bits_demanded", True) else "different, by PyTorch's attention"


def _group(title: str, rows: Mapping[str, Row]) -> Section:
    """One group of the benchmarks, with the reasons of missing figures."""
    headings, lines = cells(rows)
    return title, (*headings, ""), [(*line, reason(row)) for line, row in zip(lines, rows.values(), strict=True)]


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The sections for a terminal; the benchmarks have printed their own."""
    made, own = [], found["times"].get("groups", {})
    for title, headings, lines in sections(found):
        if title in own:
            continue
        table = Table(*headings, title=title, title_justify="left")
        for row in lines:
            table.add_row(*(Text(cell) for cell in row))  # an error's brackets are no markup
        made.append(table)
    return made


def markdown(found: Mapping[str, Any], passed: bool) -> str:
    """The sections as a document."""
    lines = [f"# cast_kernels {found['cast_kernels']} on {found['device']['name']}", ""]
    for title, headings, texts in sections(found):
        plain = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in texts]
        lines += [f"## {title[0].upper()}{title[1:]}", "", *markdown_table(headings, plain), ""]
    told = [f"- {note}" for note in notes(found["times"].get("groups", {}))]
    told += ["", order.line(found["times"].get("groups", {}))]
    return "\n".join([*lines, *told, "", verdict(found, passed), ""])
