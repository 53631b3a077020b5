"""What a process of rows tells whoever started it, by three environment variables."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Exit status of a process once the GPU can be used no more.
BROKEN = 86


class Rows:
    """Lines of JSON, each written at once, so that none is lost with the process.

    Without the variables, for a trial by hand, lines go to standard output, nothing is left out and time does not end.
    """

    def __init__(self) -> None:
        begun = os.environ.get("FIRST_CONTACT_BEGUN")
        self._path = os.environ.get("FIRST_CONTACT_ROWS", "/dev/stdout")
        self._until = float(os.environ.get("FIRST_CONTACT_UNTIL", math.inf))
        #: Rows that processes before this one began.
        self.begun = set(Path(begun).read_text().splitlines()) if begun else set()

    def seconds_left(self) -> float:
        """Until the process is killed."""
        return self._until - time.time()

    def plan(self, names: Iterable[str]) -> None:
        """Say which rows there are, those of earlier processes included."""
        self._tell({"rows": list(names)})

    def begin(self, name: str) -> None:
        """Say that a row begins: what comes next in this process is its."""
        self._tell({"row": name, "begins": True})

    def end(self, name: str, /, ok: bool | None, **found: Any) -> None:
        """Say what was found, which JSON can hold; ok is None where there is nothing to be right or wrong."""
        self._tell({"row": name, "ok": ok, **found})

    def _tell(self, entry: dict[str, Any]) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(entry, default=str) + "\n")
