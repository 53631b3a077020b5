"""Write a study as a document: `python -m cast.study.report runs/study/study.json benchmarks/results/study.md`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cast.ground.files import write_text
from cast.study.results import METRICS, tally

_HEAD = """<!-- Written by `python -m cast.study.report {source} {path}`. -->
# The paper's ablations in miniature

Top-1 accuracy in percent on {clips:,} clips of the digits data, mean and standard deviation of {seeds} seeds, beside
the paper's figures on EPIC-Kitchens-100. What a miniature is, and what to hold against it:
[the study](../../docs/study.md).
Measured on {date}, {cpu}, {cores} cores, torch {torch}; the rows' trainings, one thread each, took {hours:.1f} hours.

An ordering is a pair of rows that the paper tells apart. It *holds* if the row that the paper has ahead is ahead with
every seed, is *reversed* if it is behind with every seed, else it is *undecided*.
"""


def main(source: str, path: str) -> None:
    """Write the document about a `study.json`."""
    study = json.loads(Path(source).read_text(encoding="utf-8"))
    write_text(Path(path), document(study, source, path))


def document(study: Mapping[str, Any], source: str, path: str) -> str:
    """The whole text.

    Args:
        study: content of `study.json`.
        source, path: of the files, for the command in the text.
    """
    tables = list(study["tables"].values())
    head = _HEAD.format(
        source=source,
        path=path,
        seeds=study["seeds"],
        date=study["date"],
        clips=study["settings"]["sizes"]["val"],
        **{name: study["machine"][name] for name in ("cpu", "cores", "torch")},
        hours=study["training_seconds"] / 3600,
    )
    parts = [head, "## All orderings", *_tallies(tables)]
    for table in tables:
        parts += [f"\n## {table['source']}: {table['title']}", *_rows(table["rows"]), *_against(table["orderings"])]
    return "\n".join(parts) + "\n"


def _tallies(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| table | verb | noun | action |", "|---|---|---|---|"]
    everything: list[Mapping[str, Any]] = []
    for table in tables:
        everything += table["orderings"]
        lines.append(_tally(table["source"], table["orderings"]))
    lines.append(_tally("**all**", everything))
    return ["Holds / undecided / reversed.\n", *lines]


def _tally(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    counts = tally(found)
    cells = [" / ".join(str(n) for n in counts[metric].values()) for metric in METRICS]
    return f"| {name} | {' | '.join(cells)} |"


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| | paper: verb | noun | action | here: verb | noun | action |", "|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        paper = [f"{row['paper'][metric]:.1f}" if row["paper"] else "-" for metric in METRICS]
        own = ["not run", "", ""]
        if "mean" in row:
            own = [f"{row['mean'][metric]:.1f} ± {row['spread'][metric]:.1f}" for metric in METRICS]
        lines.append(f"| {row['label']} | {' | '.join([*paper, *own])} |")
    return lines


def _against(orderings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence about reversed orderings; nothing if there are none."""
    lines = [
        f"{o['metric']}: {o['better']} over {o['worse']} (paper {o['paper']:+.1f}, here {o['gain']:+.1f})"
        for o in orderings
        if o["verdict"] == "reversed"
    ]
    return [f"\nReversed: {'; '.join(lines)}."] if lines else []


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    _parser.add_argument("source", help="a study's study.json")
    _parser.add_argument("path", help="the document")
    main(**vars(_parser.parse_args()))
