"""Runs tests/interpreted in one process in which Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


def start_interpreted(*arguments: str) -> subprocess.Popen[str]:
    """pytest under TRITON_INTERPRET=1 in the background, on one thread."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "PYTHONPATH": str(FOLDER.parent.parent), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
    return subprocess.Popen(
        command, env=environment, cwd=FOLDER.parent.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


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
