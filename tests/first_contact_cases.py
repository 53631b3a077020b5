"""Stages whose rows live, die or hang as they are called, for tests of what runs them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from first_contact.budget import Budget
from first_contact.outputs import Outputs
from first_contact.run import Contact
from first_contact.stages import Stage

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}

#: Begins its rows one after the other; what a row is called says what becomes of it.
ROWS = """
import os, signal, subprocess, sys, time
from first_contact.rows import Rows
rows = Rows()
rows.plan(sys.argv[1:])
for name in sys.argv[1:]:
    if name in rows.begun or rows.seconds_left() < 0.2:
        continue
    rows.begin(name)
    print("now", name, os.getpid(), flush=True)
    if "dies" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "exits" in name:
        sys.exit(86)
    if "hangs" in name:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        time.sleep(60)
    if "slow" in name:
        time.sleep(0.5)
    if "breaks" in name:
        rows.end(name, True)
        sys.exit("an error between two rows")
    if "ends" in name:
        rows.end(name, False, why_not="a wrong number")
        sys.exit(86)
    rows.end(name, "wrong" not in name, ms=1.5)
"""


def stage(name: str, *rows: str, seconds: float = 20.0, **more: Any) -> Stage:
    return Stage(name, f"about {name}", (sys.executable, "-c", ROWS, *rows), seconds, needs=0.1, **more)


def contact(
    folder: Path, stages: Sequence[tuple[Stage, ...]], seconds: float = 60.0, limit: int = 1 << 20
) -> tuple[int, Contact]:
    made = Contact(Outputs(folder, limit), Budget(seconds, reserve=0.0), ENVIRONMENT, False)
    return made.run(stages), made


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # of a process that has just ended, for example
        return ""
