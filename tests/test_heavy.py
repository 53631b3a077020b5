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


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python tests/heavy.py` of a tree that lies in the folder."""
    code = (
        f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parent)!r}); import heavy; "
        f"heavy.ROOT = pathlib.Path.cwd(); heavy.RESULTS = heavy.ROOT / 'heavy.json'; "
        f"heavy.circumstances = lambda: {CIRCUMSTANCES!r}; sys.exit(heavy.main(sys.argv[1:]))"
    )
    words = (sys.executable, "-c", code, *words)
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One heavy test, with a row, and a row of a test in another file."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = heavy\naddopts = -p no:cacheprovider\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_here.py").write_text("import pytest\n@pytest.mark.heavy\ndef test_here(): pass\n")
    rows = [{"test": f"tests/test_{name}.py::test_{name}", "outcome": "passed"} for name in ("here", "there")]
    heavy.write(tmp_path / "heavy.json", rows)
    return tmp_path


def kept(tree: Path) -> list[str]:
    return [row["test"].rpartition("_")[2] for row in heavy.read(tree / "heavy.json")]


def test_a_file_that_does_not_import_keeps_its_rows_and_fails_the_command(tree: Path) -> None:
    (tree / "tests/test_there.py").write_text("import no_such_module\n")
    done = command(tree, "tests/test_here.py")
    assert done.returncode > 1, done.stdout
    assert "no_such_module" in done.stdout
    assert "have passed" not in done.stdout
    assert kept(tree) == ["here", "there"]
    (tree / "tests/test_there.py").unlink()
    done = command(tree, "tests/test_here.py")
    assert done.returncode == 0, done.stdout
    assert "1 of 1 heavy tests have passed" in done.stdout
    assert kept(tree) == ["here"], "a test that is gone takes its row along"


def test_a_file_that_is_skipped_as_a_whole_keeps_its_rows_and_fails_the_command(tree: Path) -> None:
    """Which tests it has is not known, so neither is whether all have passed."""
    skipped = "import pytest\npytest.importorskip('no_such_module')\npytestmark = pytest.mark.heavy\n"
    (tree / "tests/test_there.py").write_text(skipped)
    done = command(tree, "tests/test_here.py")
    assert done.returncode == 1, done.stdout
    assert "could be collected" in done.stdout
    assert kept(tree) == ["here", "there"]


@pytest.mark.parametrize("word", ["--help", "--collect-only"])
def test_what_runs_no_test_judges_none(tree: Path, word: str) -> None:
    before = (tree / "heavy.json").read_bytes()
    done = command(tree, word)
    assert done.returncode == 0, done.stderr
    assert "have passed" not in done.stdout
    assert (tree / "heavy.json").read_bytes() == before


def test_the_circumstances_name_this_tree_and_machine() -> None:
    found = heavy.circumstances()
    assert set(found) == set(CIRCUMSTANCES)
    assert "core" in found["machine"]
    assert found["versions"].startswith(f"Python {sys.version_info.major}.{sys.version_info.minor}.")


def test_the_kept_results_are_of_tests_that_are_there() -> None:
    for row in json.loads(heavy.RESULTS.read_text()):
        file, _, name = row["test"].partition("::")
        assert name.partition("[")[0] in (heavy.ROOT / file).read_text(), row["test"]
        assert set(row) == {"test", "outcome", "seconds", *CIRCUMSTANCES}
        assert row["outcome"] == "passed", row["test"]
