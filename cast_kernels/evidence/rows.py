"""Rows of evidence in a file that commands write in parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cast_kernels.evidence.cases import KINDS
from cast_kernels.evidence.problems import COMPILED


def keep(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Write the rows of some targets and dtypes into a file. They replace earlier ones of these; others stay.

    A row is a line, so that differences are visible. Targets and dtypes are in the commands' order.

    Args:
        rows: each with a "target" out of :data:`COMPILED` and a "dtype" out of :data:`KINDS`.
        file: created if missing.
    """
    own = {(row["target"], row["dtype"]) for row in rows}
    before = json.loads(file.read_text()) if file.exists() else []
    kept = [*rows, *(row for row in before if (row["target"], row["dtype"]) not in own)]
    kept.sort(key=lambda row: (COMPILED.index(row["target"]), [*KINDS].index(row["dtype"])))
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in kept) + "\n]\n")
