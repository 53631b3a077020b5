"""The reports of a process of rows to its parent, configured by three environment variables."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Exit status of a process after the GPU became unusable.
BROKEN = 86


class Rows:
    """Lines of JSON, each written at once, so that a crash loses none.

    Without the variables, for a trial by hand, lines go to standard output, no row is skipped and there is no time
    limit.
    """

    def __init__(self) -> None:
        begun = os.environ.get("FIRST_CONTACT_BEGUN")
        self._path = os.environ.get("FIRST_CONTACT_ROWS", "/dev/stdout")
        self._until = float(os.environ.get("FIRST_CONTACT_UNTIL", math.inf))
        #: Rows that earlier processes began.
        self.begun = set(Path(begun).read_text().splitlines()) if begun else set()

    def seconds_left(self) -> float:
        """Seconds until the process is killed."""
        return self._until - time.time()

    def plan(self, names: Iterable[str]) -> None:
        """Report the names of all rows, including those of earlier processes."""
        self._tell({"rows": list(names)})

    def begin(self, name: str) -> None:
        """Report the start of a row; the next result of this process belongs to it."""
        self._tell({"row": name, "begins": True})

    def end(self, name: str, /, ok: bool | None, **found: Any) -> None:
        """Report a result of JSON values; `ok` is None if there is nothing to judge."""
        self._tell({"row": name, "ok": ok, **found})

    def _tell(self, entry: dict[str, Any]) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(entry, default=str) + "\n")
