"""docs/performance.md and its plot say what benchmarks/results say, and the README says the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tables
from plot import fastest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()


def texts(picture: Path) -> list[str]:
    """Every word of an SVG: its figures, whatever version of matplotlib drew it."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.read_text())


def test_the_document_is_made_of_the_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python benchmarks/tables.py` writes both anew."""
    (tmp_path / "pictures").mkdir()
    tables.main(tmp_path)
    assert (tmp_path / "performance.md").read_text() == (DOCS / "performance.md").read_text()
    drawn = texts(tmp_path / "pictures" / "speedups.svg")
    assert drawn == texts(DOCS / "pictures" / "speedups.svg")
    assert sum(word.endswith("x") for word in drawn) > 10
    said = capsys.readouterr().out.strip()
    assert said
    assert said in " ".join(README.split())


def samples(*values: float, **more: Any) -> dict[str, Any]:
    return {"all_ms": list(values), **more}


def test_few_samples_and_inexact_results_have_no_speed_up() -> None:
    rows = tables.completed(
        {"eager": samples(4.0, 4.0, 4.0), "ours": samples(2.0, 1.0, 4.0), "two samples": samples(1.0, 1.0),
         "wrong": samples(1.0, 1.0, 1.0, correct=False)}
    )  # fmt: skip
    assert (rows["ours"]["speedup"], rows["ours"]["speedup_spread"]) == (2.0, [1.0, 4.0])
    assert rows["two samples"]["speedup"] is rows["wrong"]["speedup"] is None
    text = tables.table("group", rows)
    assert "| wrong | 1 (1..1) | inexact |" in text
    assert "| two samples | 1 (1..1) |  |" in text
    assert fastest(rows, of_ours=False) == ("ours", rows["ours"])  # no name of ours
    assert fastest({"cast_kernels, cpu": rows["wrong"]}, of_ours=True) is None


def test_a_row_where_a_peer_is_faster_is_called_behind() -> None:
    rows = {
        "eager": samples(4.0, 4.0, 4.0), "tuned": samples(2.0, 2.0, 2.0), "cast_kernels, cpu": samples(3.0, 3.0, 3.0),
        "cast_kernels, cpu, recompute=nothing": samples(1.0, 1.0, 1.0),
    }  # fmt: skip
    run = tables.Recording("bcast", {}, {"bcast fp32": tables.completed(rows)}, True)
    line = tables.glance([run]).splitlines()[-1]
    assert line == ("| B-CAST fp32 | tuned: 2.00 (2.00..2.00) | 1.33 (1.33..1.33) (behind) | 4.00 (4.00..4.00) |")


def test_the_readme_is_short_and_its_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(README.splitlines()) < 120
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(snippet, "README.md", "exec"), {})
    assert "exchange runs on: cpu\n" in capsys.readouterr().out
