"""Runs tests/interpreted in one process in which Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


def run_interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest under TRITON_INTERPRET=1, on the folder unless the arguments name something else."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(FOLDER.parent.parent)}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, env=environment, cwd=FOLDER.parent.parent, capture_output=True, text=True, timeout=850
    )


def test_kernels_in_the_interpreter() -> None:
    done = run_interpreted(str(FOLDER))
    assert done.returncode == 0, f"in the interpreter's process:\n{done.stdout}\n{done.stderr}"


def test_a_failure_in_the_other_process_is_one_here(tmp_path: Path) -> None:
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_it() -> None:\n    assert 'this word' == 'seen'\n")
    done = run_interpreted(str(failing))
    assert done.returncode == 1
    assert "this word" in done.stdout


def test_the_folder_is_not_collected_without_the_interpreter() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", str(FOLDER)],
        cwd=FOLDER.parent.parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
