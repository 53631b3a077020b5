"""Installs the checkout, or says why the rest goes on without the native core, which no GPU kernel needs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    [sys.executable, "-m", "pip", "install", "-e", ".", "--no-deps", "--no-build-isolation", "--no-index"],
    [sys.executable, "setup.py", "build_ext", "--inplace"],  # where pip may not write into the environment
)
INFO = [sys.executable, "-m", "cast_kernels.cli", "info"]


def main() -> int:
    """Build by the first command that can -> exit status."""
    for command in COMMANDS:
        begin = time.perf_counter()
        print("+", *command, flush=True)
        code = subprocess.run(command, cwd=ROOT).returncode
        print(f"[exit status {code} after {time.perf_counter() - begin:.1f} s]", flush=True)
        if code == 0:
            return subprocess.run(INFO).returncode
    print("the native core was not built; everything else goes on without it", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
