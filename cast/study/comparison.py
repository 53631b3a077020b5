"""Write the table of published figures: `python -m cast.study.comparison benchmarks/results/comparison.md`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cast.ground.files import write_text
from cast.metrics import harmonic_mean
from cast.metrics.published import read_published

_TITLES = {
    "method": "method", "model": "model", "backbone": "backbone", "frames": "frames", "views": "views",
    "gflops": "GFLOPs / view", "tflops": "TFLOPs, all views", "learnable": "learnable M", "verb": "verb",
    "noun": "noun", "action": "action", "ssv2": "SSV2", "k400": "K400", "ek100": "EK100", "top1": "top-1",
    "hm_ssv2_k400": "H.M. SSV2, K400", "hm_all": "H.M. all", "source": "source",
}  # fmt: skip
_TEXT = {"method", "model", "backbone", "source"}

_HEAD = """<!-- Of cast/metrics/published.yaml: `python -m cast.study.comparison benchmarks/results/comparison.md` -->
# CAST and the published methods

Top-1 accuracy in percent. Nothing here was measured by us: every figure is as its source reports it. *Paper* is CAST,
[arXiv 2311.18825](https://arxiv.org/abs/2311.18825) (NeurIPS 2023), also for the methods that it compares with; a star
marks its authors' own runs of another method. `-`: the source gives no figure. Views are clips x crops. The paper's
"FLOPs" are multiply-accumulates: its 391 G a view are the 390.5 billion that `torch.utils.flop_counter` finds in
`cast.CAST`, halved.
"""


def main(path: str) -> None:
    """Write the document."""
    write_text(Path(path), document(read_published()))


def document(published: Mapping[str, Any]) -> str:
    """The whole text. Adds harmonic means, calculated from the figures of the same row."""
    parts = [_HEAD, "## All three data sets", f"Source: {published['headline']['source']}. {_explain_means()}\n"]
    parts += [table(published["headline"]), *_check_means(published["headline"])]
    for dataset in published["datasets"]:
        parts += [
            f"\n## {dataset['name']}",
            f"Source: {dataset['source']}.{_added(dataset)}\n",
            table(_with_mean(dataset)),
        ]
        parts += _check_cost(dataset, published["headline"])
    parts += ["\n## Later and neighbouring work", "Not in the paper; other pre-training data and sizes than CAST's.\n"]
    parts += [
        table(published["others"]),
        "\n## Where the paper contradicts itself\n",
        "| what | here | there |",
        "|---|---|---|",
    ]
    parts += [
        "| " + " | ".join(cell.replace("*", r"\*") for cell in entry) + " |" for entry in published["contradictions"]
    ]
    return "\n".join(parts) + "\n"


def table(section: Mapping[str, Any]) -> str:
    """A Markdown table; CAST's row is bold."""
    columns = section["columns"]
    lines = ["| " + " | ".join(_TITLES.get(c, c) for c in columns) + " |"]
    lines.append("|" + "|".join("---" if c in _TEXT else "---:" for c in columns) + "|")
    for row in section["rows"]:
        cells = ["-" if value is None else str(value).replace("*", r"\*") for value in row]
        bold = row[0] == "CAST"
        lines.append("| " + " | ".join(f"**{cell}**" if bold and cell != "-" else cell for cell in cells) + " |")
    return "\n".join(lines)


def _explain_means() -> str:
    return "H.M.: harmonic mean as printed; *all* is over verb, noun, SSV2 and K400."


def _added(dataset: Mapping[str, Any]) -> str:
    return " H.M.: harmonic mean of verb and noun, calculated." if "verb" in dataset["columns"] else ""


def _with_mean(dataset: Mapping[str, Any]) -> Mapping[str, Any]:
    if "verb" not in dataset["columns"]:
        return dataset
    rows = [[*row, _mean(dataset["columns"], row, ("verb", "noun"))] for row in dataset["rows"]]
    return {"columns": [*dataset["columns"], "H.M."], "rows": rows}


def _mean(columns: Sequence[str], row: Sequence[Any], names: Sequence[str]) -> float | None:
    values = [row[columns.index(name)] for name in names]
    return None if None in values else round(harmonic_mean(*map(float, values)), 1)


def _check_means(headline: Mapping[str, Any]) -> list[str]:
    """A sentence about printed harmonic means that differ, to one decimal, from those of the row's own figures."""
    columns, off = headline["columns"], []
    for row in headline["rows"]:
        for column, names in (("hm_ssv2_k400", ("ssv2", "k400")), ("hm_all", ("verb", "noun", "ssv2", "k400"))):
            printed, own = row[columns.index(column)], _mean(columns, row, names)
            if printed is not None and own is not None and abs(printed - own) > 0.051:
                off.append(f"{row[0]} ({_TITLES[column]}: printed {printed}, calculated {own})")
    return [f"\nCalculated again from each row, the harmonic means agree to 0.1 except: {', '.join(off) or 'none'}."]


def _check_cost(dataset: Mapping[str, Any], headline: Mapping[str, Any]) -> list[str]:
    """A sentence about CAST's cost over all views: the cost of a view times the views, beside the printed figure."""
    gflops = next(row for row in headline["rows"] if row[0] == "CAST")[headline["columns"].index("gflops")]
    row = next(row for row in dataset["rows"] if row[0] == "CAST")
    clips, crops = map(int, row[dataset["columns"].index("views")].split("x"))
    printed = row[dataset["columns"].index("tflops")]
    total = gflops * clips * crops / 1000
    return [f"\nCAST: {gflops} G x {clips * crops} views = {total:.2f} T (printed: {printed})."]


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    _parser.add_argument("path", help="the document")
    main(_parser.parse_args().path)
