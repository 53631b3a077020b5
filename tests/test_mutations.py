"""The mechanism of mutations.py, not the faults: those take minutes and are tried with `python tests/mutations.py`."""

from __future__ import annotations

import shutil
from pathlib import Path

import mutations
import pytest


def test_every_fault_can_be_made_and_taken_back(tmp_path: Path) -> None:
    for name in ("cast", "cast_kernels", "csrc"):
        shutil.copytree(mutations.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    assert len({fault.name for fault in mutations.FAULTS}) == len(mutations.FAULTS) >= 30
    for fault in mutations.FAULTS:
        before = mutations.apply(fault, tmp_path)
        assert before
        for path, content in before.items():
            assert path.read_text() != content, fault.name
            path.write_text(content)


@pytest.mark.parametrize(
    ("noticed", "text", "status", "said"),
    [(True, "x = 1", 0, "killed"), (False, "x = 1", 1, "SURVIVED"), (True, "y = 1", 1, "no longer applies")],
)
def test_only_a_noticed_fault_is_good(
    noticed: bool,
    text: str,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def passes(noticed_by: str, tree: Path) -> tuple[bool, str]:
        return (tree / "a.py").read_text() == "x = 1\n" or not noticed, "a sign"

    monkeypatch.setattr(mutations, "copy_tree", lambda tree: (tree / "a.py").write_text("x = 1\n"))
    monkeypatch.setattr(mutations, "passes", passes)
    monkeypatch.setattr(mutations, "FAULTS", [mutations.Fault("a fault", "native", (("a.py", text, "x = 2"),))])
    assert mutations.main([]) == status
    assert said in capsys.readouterr().out


def test_tests_that_fail_by_themselves_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutations, "copy_tree", lambda tree: None)
    monkeypatch.setattr(mutations, "passes", lambda noticed_by, tree: (False, "broken"))
    assert mutations.main([]) == 1
