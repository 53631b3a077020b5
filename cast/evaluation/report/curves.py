"""Learning curves from a training's log.

A log is JSONL, one JSON object a line, from `cast train` or another trainer. A line has `step` (optimizer steps so
far), `epoch` (a number, possibly a fraction), or both, and any number of figures. The name decides the kind of a
figure. A name with `loss` in it is a loss, `lr` is the learning rate, and a name with an accuracy in it (`acc`, `top1`,
`top5`, `verb`, `noun`, `action`, `harmonic`) is an accuracy in percent. In lines with `"kind": "epoch"` all figures but
those of the validation are means over the epoch, drawn as `epoch <name>`. Everything else is ignored: other names, the
settings in a line with `"kind": "start"`, and lines that are no JSON objects, because a kill may leave half a line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cast.ground.files import text_lines

Series = dict[str, tuple[list[float], list[float]]]

_ACCURACY = re.compile(r"(?<![a-z])(acc(?!um)|top[15]|verb|noun|action|harmonic)")
#: Names in an epoch's line that are not means over the epoch.
_KEPT = re.compile(r"(step|epoch|kind)$|val")
#: Curves of one diagram; more cannot be distinguished.
_MOST = 8


@dataclass
class Log:
    """Curves by name; x is `axis`, "epoch" or "step"."""

    axis: str
    losses: Series = field(default_factory=dict)
    accuracies: Series = field(default_factory=dict)
    rates: Series = field(default_factory=dict)
    ignored_lines: int = 0


def read_log(path: str | os.PathLike[str]) -> Log:
    """Read a training's log.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no line of the file has a figure.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such training log; give the JSONL file that the training wrote")
    lines = [line for line in text_lines(path.read_text(encoding="utf-8-sig", errors="replace")) if line.strip()]
    parsed = [entry for entry in map(_parse, lines) if entry is not None]
    entries = [entry for entry in parsed if entry]
    # Steps if every line has one. Epochs may be whole numbers, and would draw all their steps at one place.
    axis = "step" if entries and all("step" in entry for entry in entries) else "epoch"
    log = Log(axis, ignored_lines=len(lines) - len(parsed))
    for entry in entries:
        if axis in entry:
            _add(log, entry)
    if not (log.losses or log.accuracies or log.rates):
        raise ValueError(f"{path}: has no line with '{axis}' and a figure such as 'loss'; is it a training's log?")
    return log


def _parse(line: str) -> dict[str, float] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    kind = value.get("kind")
    if kind == "start":
        return {}
    if kind == "epoch":
        value = {name if _KEPT.match(name) else f"epoch {name}": figure for name, figure in value.items()}
    numbers = {str(name): figure for name, figure in _flat(value) if isinstance(figure, (int, float))}
    return {name: float(figure) for name, figure in numbers.items() if not isinstance(figure, bool)}


def _flat(value: Mapping[str, object]) -> list[tuple[str, object]]:
    """`{"val": {"verb": 1}}` -> `val verb`."""
    pairs: list[tuple[str, object]] = []
    for name, figure in value.items():
        if isinstance(figure, Mapping):
            pairs += [(f"{name} {inner}", number) for inner, number in _flat(figure)]
        else:
            pairs.append((name, figure))
    return pairs


def _add(log: Log, entry: Mapping[str, float]) -> None:
    for name, figure in entry.items():
        if name in ("step", "epoch") or figure != figure:
            continue
        if "loss" in name:
            group = log.losses
        elif name == "lr" or name.endswith(("_lr", " lr", "/lr")):
            group = log.rates
        elif _ACCURACY.search(name):
            group = log.accuracies
        else:
            continue
        if name in group or len(group) < _MOST:
            across, up = group.setdefault(name, ([], []))
            across.append(entry[log.axis])
            up.append(figure)


def thinned(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], points: int = 400) -> Series:
    """Means over runs of neighbours, at most `points` for each curve, so that a long training stays readable."""
    result: Series = {}
    for name, (across, up) in series.items():
        size = -(-len(across) // points)
        chunks = [slice(start, start + size) for start in range(0, len(across), size)]
        result[name] = (
            [sum(across[chunk]) / len(across[chunk]) for chunk in chunks],
            [sum(up[chunk]) / len(up[chunk]) for chunk in chunks],
        )
    return result
