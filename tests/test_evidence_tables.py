"""The tables in docs/evidence.md, docs/ptxas.md and docs/cuda.md are those of the files of evidence as they are."""

from __future__ import annotations

import re
from pathlib import Path

import evidence_tables
import pytest

from cast_kernels.evidence import mutant_table


@pytest.mark.parametrize("path", evidence_tables.PAGES, ids=lambda path: path.name)
def test_a_page_has_the_tables_of_the_files(path: Path) -> None:
    text = path.read_text()
    assert evidence_tables.page(text) == text, "python tests/evidence_tables.py writes them anew"


def test_each_table_stands_in_one_page_and_each_mark_is_closed() -> None:
    text = "".join(path.read_text() for path in evidence_tables.PAGES)
    begun = re.findall(r"<!-- ([\w ]+), made by tests/evidence_tables\.py -->\n", text)
    assert sorted(begun) == sorted(evidence_tables.TABLES)
    assert text.count("<!-- end of it -->\n") == len(begun)


def test_a_table_that_nothing_makes_is_refused() -> None:
    with pytest.raises(KeyError, match="no such table"):
        evidence_tables.page("<!-- no such table, made by tests/evidence_tables.py -->\n\n<!-- end of it -->\n")


def test_a_missed_fault_and_a_sample_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ["sm_80", "bf16", "exchange", "project", "barrier", 7, "bar.sync 0;", "write-read", True],
        ["sm_80", "bf16", "exchange", "project", "barrier", 9, "bar.sync 0;", "unknown", False],
        ["sm_80", "bf16", "ffn", "norm", "mask of a load", 3, "@%p1 ld.global", "guard never false", False],
    ]
    made = {"sm_80, bf16, exchange": {"every": 1}, "sm_80, bf16, ffn": {"every": 4}}
    monkeypatch.setattr(
        mutant_table, "read", lambda _: {"made": made, "columns": mutant_table.COLUMNS, "mutants": rows}
    )
    told = evidence_tables.planted()
    assert told.startswith("**3 are planted, 1 caught, 1 harmless, 1 missed.**")
    assert told.endswith("| sm_80 | bf16 | 3 | 1 | 1 | 1 | each in exchange; one of 4 in ffn |")
    assert evidence_tables.by_kind().endswith(
        "| sm_80 | bf16 | barrier | 2 | 1 | write-read 1 | unknown 1 |\n"
        "| sm_80 | bf16 | mask of a load | 1 | 0 |  | guard never false 1 |"
    )
