"""Runs tests/interpreted in one process in which Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter_process import FOLDER, start_interpreted


def test_kernels_in_the_interpreter(interpreted: subprocess.Popen[str]) -> None:
    out, _ = interpreted.communicate(timeout=850)
    assert interpreted.returncode == 0, f"in the interpreter's process:\n{out}"


def test_a_failure_in_the_other_process_is_one_here(tmp_path: Path) -> None:
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_it() -> None:\n    assert 'this word' == 'seen'\n")
    process = start_interpreted(str(failing))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "this word" in out


def test_the_folder_is_not_collected_without_the_interpreter() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", str(FOLDER)],
        cwd=FOLDER.parent.parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
