"""What `python tests/heavy.py` keeps of a run, on tests that take no time, and what it kept of the last ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import heavy
import pytest

TESTS = """
import pytest

@pytest.fixture
def broken():
    yield
    raise RuntimeError("after the test")

def test_right(): pass
def test_wrong(): assert False
def test_left(): pytest.skip("no machine for it")
def test_torn(broken): pass
"""
CIRCUMSTANCES = {"date": "2026-01-02", "commit": "abc", "machine": "none", "versions": "some"}


def test_a_run_replaces_the_rows_of_its_tests_and_no_other(tmp_path: Path) -> None:
    results = tmp_path / "heavy.json"
    old = {"test": "test_other.py::test_old", "outcome": "passed", "seconds": 5.0, "date": "2025-01-01"}
    heavy.write(results, [old, {"test": "test_some.py::test_right", "outcome": "failed", "seconds": 1.0}])
    (tmp_path / "test_some.py").write_text(TESTS)
    code = (
        f"import sys, pathlib, pytest, heavy; "
        f"pytest.main(['-q', '-p', 'no:cacheprovider', '--rootdir=.', '-c', '/dev/null', 'test_some.py'], "
        f"plugins=[heavy.Recorder(pathlib.Path('heavy.json'), {CIRCUMSTANCES!r})])"
    )
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {code}"],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    rows = {row["test"]: row for row in heavy.read(results)}
    assert rows.pop(old["test"]) == old
    assert {name.partition("::")[2]: row["outcome"] for name, row in rows.items()} == {
        "test_left": "skipped", "test_right": "passed", "test_torn": "failed", "test_wrong": "failed",
    }  # fmt: skip
    assert all(row.items() >= CIRCUMSTANCES.items() and row["seconds"] < 60 for row in rows.values())
    assert len(results.read_text().splitlines()) == len(rows) + 3, "a row a line"
    names = [*rows, "test_some.py::test_new"]
    assert [line.rpartition(": ")[2] for line in heavy.lacking(names, [*rows.values()])] == [
        "skipped", "failed", "failed", "no result",
    ]  # fmt: skip


def test_the_circumstances_name_this_tree_and_machine() -> None:
    found = heavy.circumstances()
    assert set(found) == set(CIRCUMSTANCES)
    assert "core" in found["machine"]
    assert found["versions"].startswith(f"Python {sys.version_info.major}.{sys.version_info.minor}.")


@pytest.mark.skipif(not heavy.RESULTS.exists(), reason="no heavy test has been run")
def test_the_kept_results_are_of_tests_that_are_there() -> None:
    for row in json.loads(heavy.RESULTS.read_text()):
        file, _, name = row["test"].partition("::")
        assert name.partition("[")[0] in (heavy.ROOT / file).read_text(), row["test"]
        assert set(row) == {"test", "outcome", "seconds", *CIRCUMSTANCES}
        assert row["outcome"] == "passed", row["test"]
