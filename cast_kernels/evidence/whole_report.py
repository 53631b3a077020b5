"""Whole-model predictions as tables, JSON and Markdown. Each says that nothing was timed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptx_emulator.predict.devices import device
from rich.table import Table

from cast_kernels.evidence import host
from cast_kernels.evidence.model import LABEL, UNCERTAINTY
from cast_kernels.evidence.prediction_report import constant, markdown_table

#: The ways in the order of the columns.
WAYS = ("eager AMP", "torch.compile", "ours")
#: Speed-ups over these ways on H100 with float32 streams at six clips: the goal, and the accepted least.
GOALS = {"eager AMP": (1.45, 1.25), "torch.compile": (1.20, 1.05)}

_COLUMNS = (
    "GPU", "B", "what", "streams", "eager AMP GPU", "torch.compile GPU", "ours GPU", "fixed", "eager AMP host",
    "torch.compile host", "ours host", "GPU: to eager", "to compile", "no graphs: to eager", "to compile",
    "graphs: to eager", "to compile", "ours bound by",
)  # fmt: skip

_WHAT = ("kernels", "GB", "TFLOP", "ms")
#: Ways in which each kernel belongs to one part.
_APART = ("eager AMP", "ours")

Found = Mapping[str, Any]


def grouped(ways: Iterable[Found]) -> list[dict[str, Found]]:
    """The ways of one problem together: name of the way -> its entry."""
    groups: dict[tuple[Any, ...], dict[str, Found]] = {}
    for way in ways:
        model = way["model"]
        key = (way["device"], model["streams"], not model["training"], model["batch"])
        groups.setdefault(key, {})[way["way"]] = way
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], key[1] != "fp32", key[2], key[3]))]


def cells(group: Mapping[str, Found]) -> tuple[str, ...]:
    """One line of the summary, in milliseconds; a ratio above 1 means that ours is faster."""
    ours, model = group["ours"], group["ours"]["model"]

    def ratio(what: str, way: str) -> str:
        return f"{group[way][what] / ours[what]:.2f}"

    bound = "GPU" if ours["gpu_us"] >= ours["host_us"] else "host"
    return (
        ours["device"], str(model["batch"]), "training step" if model["training"] else "inference", model["streams"],
        *(f"{group[way]['gpu_us'] / 1e3:.1f}" for way in WAYS), f"{ours['fixed_us'] / 1e3:.1f}",
        *(f"{group[way]['host_us'] / 1e3:.1f}" for way in WAYS),
        *(ratio(what, way) for what in ("gpu_us", "without_graphs_us", "with_graphs_us") for way in WAYS[:2]), bound,
    )  # fmt: skip


def summary(ways: Iterable[Found]) -> Table:
    """A table of totals."""
    table = Table(title=f"milliseconds, +-{UNCERTAINTY:.0%}; {LABEL}", title_justify="left")
    rows = [cells(group) for group in grouped(ways)]
    for name, *column in zip(_COLUMNS, *rows, strict=True):  # no word is cut short
        table.add_column(name, min_width=max(map(len, " ".join((name, *column)).split())))
    for row in rows:
        table.add_row(*row)
    return table


def goals(ways: Iterable[Found]) -> list[str]:
    """The goals of a training step at six clips on H100 with float32 streams, and the predictions."""
    lines = []
    for group in grouped(ways):
        ours, model = group["ours"], group["ours"]["model"]
        if (ours["device"], model["batch"], model["streams"], model["training"]) != ("H100", 6, "fp32", True):
            continue
        for what in ("gpu_us", "without_graphs_us", "with_graphs_us"):
            for way, (aimed, accepted) in GOALS.items():
                value = group[way][what] / ours[what]
                verdict = "met     " if value >= aimed else "accepted" if value >= accepted else "missed  "
                name = what.removesuffix("_us").replace("_", " ")
                lines.append(f"{verdict}  {name}: {value:.2f}x {way}, goal {aimed:.2f}x, accepted {accepted:.2f}x")
    return lines


def by_part(group: Mapping[str, Found]) -> list[tuple[str, ...]]:
    """Part and kind -> figures of eager and of ours. torch.compile is missing because it fuses across parts."""
    found: dict[tuple[str, str], dict[str, list[Found]]] = {}
    for way in _APART:
        for row in group[way]["rows"]:
            key = (row["part"].partition(":")[0], row["kind"])
            found.setdefault(key, {}).setdefault(way, []).append(row)
    return [
        (part, kind, *(cell for way in _APART for cell in _figures(ways.get(way, []))))
        for (part, kind), ways in found.items()
    ]


def by_kind(group: Mapping[str, Found]) -> list[tuple[str, ...]]:
    """Kind -> figures of every way."""
    kinds = dict.fromkeys(row["kind"] for way in WAYS for row in group[way]["rows"])
    rows = {kind: [[row for row in group[way]["rows"] if row["kind"] == kind] for way in WAYS] for kind in kinds}
    return [(kind, *(cell for own in rows[kind] for cell in _figures(own))) for kind in kinds]


def _figures(rows: Sequence[Found]) -> tuple[str, ...]:
    """Kernels, GB, TFLOP and milliseconds of some rows; empty without rows."""
    if not rows:
        return ("",) * len(_WHAT)
    kernels, moved, flops, us = (sum(row[what] for row in rows) for what in ("kernels", "bytes", "flops", "us"))
    return f"{kernels:.0f}", f"{moved / 1e9:.2f}", f"{flops / 1e12:.2f}", f"{us / 1e3:.2f}"


def write(ways: Sequence[Found], folder: Path, command: str, date: str) -> None:
    """Write one JSON file for each GPU, and README.md with the tables of all files in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(way["device"] for way in ways):
        head = {"label": LABEL, "uncertainty": UNCERTAINTY, "command": command, "date": date, "host": _host()}
        head["constants"] = {"multiprocessors": device(name).target.processors}
        lines = ",\n".join(json.dumps(_rounded(way)) for way in ways if way["device"] == name)
        text = json.dumps(head, indent=1)[:-2] + f',\n "ways": [\n{lines}\n]\n}}\n'
        (folder / f"{name.lower()}.json").write_text(text)
    (folder / "README.md").write_text(markdown(folder))


def _host() -> dict[str, Any]:
    named = {
        "operator": host.OPERATOR, "launch of ours": host.TRITON, "launch": host.LAUNCH, "compiled": host.COMPILED,
        "graph": host.GRAPH,
    }  # fmt: skip
    return {name: constant(value) for name, value in named.items()}


def _rounded(value: Any) -> Any:
    """Round numbers to a tenth: microseconds, bytes and FLOPs."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 1) if isinstance(value, float) and value > 10 else value


def markdown(folder: Path) -> str:
    """The folder's predictions as text."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    ways = [way for found in files for way in found["ways"]]
    six = next(
        (g for g in grouped(ways) if cells(g)[:4] == ("H100", "6", "training step", "fp32")), grouped(ways)[0]
    )  # fmt: skip
    where = "{device}, B = {model[batch]}, {model[streams]} streams".format(**six["ours"])
    lines = [
        "# Predicted times of a whole CAST-B", "",
        f"Written by `{files[0]['command']}` on {files[0]['date']}. **{LABEL[0].upper()}{LABEL[1:]}.** Milliseconds, "
        f"+-{UNCERTAINTY:.0%}. `fixed` is what no fusion of ours can change: the library's products and attention as "
        "ours calls them, and the optimizer. A ratio above 1 says that ours is faster. What the rules are: "
        "[docs/evidence.md](../../../docs/evidence.md#a-whole-model-predicted).", "",
        *markdown_table(_COLUMNS, [cells(group) for group in grouped(ways)]), "",
        *[f"- {line}" for line in goals(ways)], "",
        f"## By kind: {where}", "",
        *markdown_table(("kind", *(f"{way} {what}" for way in WAYS for what in _WHAT)), by_kind(six)), "",
        f"## By part and kind: {where}", "",
        *markdown_table(("part", "kind", *(f"{way} {what}" for way in _APART for what in _WHAT)), by_part(six)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
