"""benchmarks/results/comparison.md says what its data file says, and the data file is sound."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from cast.metrics.published import read_published
from cast.study.comparison import document, main, table

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return read_published()


def test_the_document_is_what_the_generator_writes(tmp_path: Path) -> None:
    main(str(tmp_path / "comparison.md"))
    assert (ROOT / "benchmarks/results/comparison.md").read_text() == (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize("module", ["comparison", "report"])
def test_asking_for_help_writes_nothing(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "cast" / "study" / f"{module}.py"), run_name="__main__")
    assert caught.value.code == 0
    assert not list(tmp_path.iterdir())


def test_every_row_fits_its_columns_and_every_table_has_a_source(published: dict[str, Any]) -> None:
    sections = [published["headline"], *published["datasets"]]
    assert all(section["source"].startswith("paper, Table ") for section in sections)
    assert published["others"]["columns"][-1] == "source"
    for section in [*sections, published["others"]]:
        assert all(len(row) == len(section["columns"]) for row in section["rows"])
        names = [row[0] for row in section["rows"]]
        assert len(names) == len(set(names))
    assert all(row[-1] for row in published["others"]["rows"])
    assert all(len(entry) == 3 for entry in published["contradictions"])


def test_figures_that_stand_in_two_tables(published: dict[str, Any]) -> None:
    """CAST's agree; where others' do not, the list of contradictions names the method."""
    head = {row[0].strip("*"): row for row in published["headline"]["rows"]}
    columns = published["headline"]["columns"]
    named = " ".join(entry[0] for entry in published["contradictions"])
    for dataset, column in zip(published["datasets"], ("verb", "ssv2", "k400"), strict=True):
        for row in dataset["rows"]:
            method = row[0].strip("*")
            value = row[dataset["columns"].index("verb" if column == "verb" else "top1")]
            if method in head and head[method][columns.index(column)] not in (None, value):
                assert method != "CAST"
                assert method in named, (dataset["name"], method)


def test_a_changed_figure_changes_the_document(published: dict[str, Any]) -> None:
    text = document(published)
    assert "391 G x 6 views = 2.35 T (printed: 2.35)" in text
    assert "391 G x 15 views = 5.87 T (printed: 5.87)" in text
    assert "agree to 0.1 except: Video Swin" in text
    assert (
        "| **CAST** | **CAST-B** | **16** | **2x3** | **2.35** | **45** | **72.5** | **60.9** | **49.3** | **66.2** |"
        in text
    )
    published["headline"]["rows"][-1][-1] = 70.0
    assert "CAST (H.M. all: printed 70.0, calculated 71.6)" in document(published)


def test_tables() -> None:
    section = {"columns": ["method", "top1"], "rows": [["A*", None], ["CAST", 1.5]]}
    assert table(section) == "| method | top-1 |\n|---|---:|\n| A\\* | - |\n| **CAST** | **1.5** |"
