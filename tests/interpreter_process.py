"""Processes beside the tests: one in which Triton interprets its kernels, since that is chosen once, when triton is
imported; and one that compiles for later tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def start_compiling() -> subprocess.Popen[str]:
    """`compiled_ahead.py` in the background, on one thread; what it says is said by the tests too."""
    root = FOLDER.parent.parent
    paths = os.pathsep.join([str(root), str(root / "tools"), str(FOLDER.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER.parent / "compiled_ahead.py")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
