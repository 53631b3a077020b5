"""Installs the checkout, or says why the rest goes on without the native core, which no GPU kernel needs."""

from __future__ import annotations

import subprocess
import sys
import time

from first_contact.stages import ROOT

COMMANDS = (
    [sys.executable, "-m", "pip", "install", "-e", ".", "--no-deps", "--no-build-isolation", "--no-index"],
    [sys.executable, "setup.py", "build_ext", "--inplace"],  # where pip may not write into the environment
)
INFO = [sys.executable, "-m", "cast_kernels", "info"]
#: Ends with a line that says why, if the core is not there: a build that fails leaves it out and succeeds.
CORE = [sys.executable, "-c", "from cast_kernels import _native; _native.core()"]


def main() -> int:
    """Build by the first command that can -> exit status: 0 where one could, and there is a native core."""
    for command in COMMANDS:
        begin = time.perf_counter()
        print("+", *command, flush=True)
        code = subprocess.run(command, cwd=ROOT).returncode
        print(f"[exit status {code} after {time.perf_counter() - begin:.1f} s]", flush=True)
        if code == 0:
            break
    subprocess.run(INFO)
    loads = subprocess.run(CORE).returncode
    if code and not loads:  # it was there before
        print(f"no command could build: exit status {code}; the native core that loads is an older one", flush=True)
    return code or loads


if __name__ == "__main__":
    sys.exit(main())
