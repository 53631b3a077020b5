"""Write docs/performance.md and its plot from the measurements in benchmarks/results: `python benchmarks/tables.py`.

The terminal's tables, the report of `gpu-check` and this document have the same columns (`cast_kernels/gpu/rows.py`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plot import default, fastest, label, ours, speedup_plot

from cast_kernels.gpu.rows import Row, cells, notes, reason, speedup
from cast_kernels.gpu.timing import FEWEST, Spread, speedups

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

#: End of a file's name -> the machine, the newest first.
MACHINES = {
    "zen4": "2 cores of an AMD EPYC, Zen 4 (family 25, model 17): AVX-512 with bfloat16",
    "zen3": "2 cores of an AMD EPYC, Zen 3 (family 25, model 1): AVX2",
}
#: Beginning of a file's name -> its subject, in the order of the document.
SUBJECTS = {
    "model": "CAST-B/16 whole",
    "bcast": "B-CAST",
    "experts": "The experts' two ops",
    "data": "Reading videos",
}

_HEAD = """<!-- Written by `python benchmarks/tables.py` from benchmarks/results. -->
# Performance

All figures are of CPUs. **No kernel of ours has run on a GPU**: what stands in for a measurement there are
[predictions](../benchmarks/predictions/README.md), and [evidence](evidence.md) says how they are made. A table is one
interleaved run: every row is timed once a round, side by side, by the command above it.

![Speed-ups over eager PyTorch](pictures/speedups.svg)

How to read the tables:

"""

_OLD = (
    "Measured by an earlier version of the benchmark, which had other groups and kept fewer samples of slow rows. "
    f"A row with fewer than {FEWEST} has no speed-up here. Our default level of recomputing was `cheap` then.\n"
)


@dataclass(frozen=True)
class Recording:
    """The measurements of one command.

    Args:
        subject: a key of :data:`SUBJECTS`.
        environment: machine, versions, date, command.
        groups: title -> row's name -> its figures.
        whole: whether every row has all figures of the present benchmark.
    """

    subject: str
    environment: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, Row]]
    whole: bool


def runs(machine: str, folder: Path = RESULTS) -> list[Recording]:
    """A machine's runs, in the order of the document."""
    return [
        Recording(
            subject, found["environment"], {title: completed(rows) for title, rows in found["groups"].items()}, whole
        )
        for subject in SUBJECTS
        for path in [folder / f"{subject}_{machine}.json"]
        if path.exists()
        for found, whole in _recorded(json.loads(path.read_text()))
    ]


def _recorded(content: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """The runs of a file. `--rows` writes one run; an earlier version wrote several."""
    yield from ((found, False) for found in content["runs"]) if "runs" in content else [(content, True)]


def completed(rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows with spreads and paired ratios computed from their samples. Too few samples give no speed-up."""
    baseline = next(iter(rows.values()))
    made = {}
    for name, row in rows.items():
        made[name] = row = dict(row)
        samples = row.get("all_ms")
        if not samples or "spread_ms" in row:
            continue
        spread = Spread.of(samples)
        row |= {"median_ms": spread.median, "spread_ms": [spread.low, spread.high], "speedup": None}
        if row.get("correct", True) and FEWEST <= len(samples) == len(baseline["all_ms"]):
            ratio = speedups(baseline["all_ms"], samples)
            row |= {"speedup": ratio.median, "speedup_spread": [ratio.low, ratio.high]}
    return made


def document(measured: Mapping[str, list[Recording]]) -> str:
    """The whole text of docs/performance.md."""
    groups = {title: rows for found in measured.values() for run in found for title, rows in run.groups.items()}
    parts = [_HEAD + "".join(f"- {note}\n" for note in notes(groups) if "below" not in note)]
    parts.append("- of ceiling: share of the machine's rate of float32 multiply-adds, measured in the same run\n")
    parts.append("- kept MiB: what backward is given besides the parameters, the operation's inputs included\n")
    for machine, found in measured.items():
        if not found:
            continue
        parts.append(f"\n## {MACHINES[machine]}\n\n{glance(found)}")
        previous = ""
        for run in found:
            if run.subject != previous:
                parts.append(f"\n### {SUBJECTS[run.subject]}\n")
            previous = run.subject
            parts.append(_run(run))
    return "".join(parts)


def glance(found: list[Recording]) -> str:
    """A line for each group with the speed-ups of the fastest exact peer, our default and our fastest level."""
    text = [
        _line(["speed-up over eager (spread)", "fastest exact row without us", "ours, default", "ours, fastest level"]),
        _line(["---", "--:", "--:", "--:"]),
    ]
    for run in found:
        for title, rows in run.groups.items():
            mine, peer, best = default(rows), fastest(rows, False), fastest(rows, True)
            if mine is None or peer is None or best is None:
                continue
            name = "eager itself" if peer[1] is next(iter(rows.values())) else peer[0]
            behind = "" if mine["speedup"] >= peer[1]["speedup"] else " (behind)"
            text.append(_line([label(title), f"{name}: {speedup(peer[1])}", speedup(mine) + behind, speedup(best[1])]))
    return "".join(text)


def _run(run: Recording) -> str:
    about = run.environment
    lines = [
        f"\n`{about['command']}`, {about['date']}, torch {about['torch']}, {about['threads']} threads.\n",
        "" if run.whole else _OLD,
        *(table(title, rows) for title, rows in run.groups.items()),
    ]
    return "".join(lines)


def table(title: str, rows: Mapping[str, Row]) -> str:
    """A group in Markdown, ours in bold, with the reasons for missing figures."""
    headers, lines = cells(rows)
    text = [f"\n**{title}**\n\n", _line(headers), _line(["---", *["--:"] * (len(headers) - 1)])]
    for name, *figures in lines:
        text.append(_line([f"**{name}**" if ours(name) else name, *figures]))
    why = {name: reason(row) for name, row in rows.items() if reason(row)}
    text += [f"\n{name}: {what}\n" for name, what in why.items()]
    return "".join(text)


def _line(words: list[str]) -> str:
    return f"| {' | '.join(word.replace('|', chr(92) + '|') for word in words)} |\n"


#: Beginning of a group's title -> its name in the README.
_HEADLINES = {
    "model inference fp32": "inference",
    "model training step fp32": "a training step",
    "bcast fp32 B1 inference": "B-CAST forward",
    "bcast fp32 B1 training": "B-CAST forward and backward",
}


def headline(found: list[Recording]) -> str:
    """The README's sentence: the speed-ups of our default and of the fastest exact row without us."""
    said = []
    for run in found:
        for title, rows in run.groups.items():
            name = next((text for start, text in _HEADLINES.items() if title.startswith(start)), None)
            mine, peer = default(rows), fastest(rows, False)
            if name and mine and peer:
                said.append(f"{name} {mine['speedup']:.2f}x (next best {peer[1]['speedup']:.2f}x)")
    return ", ".join(said)


def main(docs: Path) -> None:
    """Write the document and its plot into the folder, and print the README's sentence."""
    measured = {machine: runs(machine) for machine in MACHINES}
    (docs / "performance.md").write_text(document(measured))
    newest = next(machine for machine, found in measured.items() if found)
    print(headline(measured[newest]))
    groups = {title: rows for run in measured[newest] for title, rows in run.groups.items()}
    speedup_plot(groups, MACHINES[newest], docs / "pictures" / "speedups.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("docs", type=Path, nargs="?", default=ROOT / "docs", help="the folder that takes the document")
    main(parser.parse_args().docs)
