"""The process in which Triton interprets its kernels: the choice is made when triton is imported, once a process."""

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
