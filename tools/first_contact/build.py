"""Install the checkout. If the native core cannot be built, the run continues, because no GPU kernel needs it."""

from __future__ import annotations

import subprocess
import sys
import time

from first_contact.stages import ROOT

COMMANDS = (
    [sys.executable, "-m", "pip", "install", "-e", ".", "--no-deps", "--no-build-isolation", "--no-index"],
    [sys.executable, "setup.py", "build_ext", "--inplace"],  # for an environment where pip may not write
)
INFO = [sys.executable, "-m", "cast_kernels", "info"]
#: Prints the reason if there is no core: a failed build omits the core and succeeds.
CORE = [sys.executable, "-c", "from cast_kernels import _native; _native.core()"]


def main() -> int:
    """Build by the first command that succeeds -> exit status: 0 if there is a new native core."""
    for command in COMMANDS:
        begin = time.perf_counter()
        print("+", *command, flush=True)
        code = subprocess.run(command, cwd=ROOT).returncode
        print(f"[exit status {code} after {time.perf_counter() - begin:.1f} s]", flush=True)
        if code == 0:
            break
    subprocess.run(INFO)
    loads = subprocess.run(CORE).returncode
    if code and not loads:  # it is from an earlier build
        print(f"no command could build: exit status {code}; the native core that loads is an older one", flush=True)
    return code or loads


if __name__ == "__main__":
    sys.exit(main())
