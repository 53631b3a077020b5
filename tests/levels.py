"""Instruction-set levels of the native core, and running a test file as a script at one of them.

A process chooses its level once, so each level needs a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cast_kernels import _native

#: In rising order.
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
BUILT = _native.CORE.built_levels().split(",") if _native.CORE is not None else []
USABLE = [level for level in BUILT if LEVELS.index(level) <= LEVELS.index(_native.ISA)]


def run_at(level: str, script: str) -> Any:
    """What the script prints as JSON when it runs at the level; skips where this processor or build has none."""
    if level not in USABLE:
        pytest.skip(f"{level} is not in this build or not on this processor (usable: {', '.join(USABLE)})")
    environment = os.environ | {"CAST_KERNELS_CPU_ISA": level, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, script, level]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_level() -> None:
    """In the script: that it runs at the level that it was called with."""
    assert sys.argv[1] == _native.ISA, f"asked for {sys.argv[1]}, runs {_native.ISA}"
