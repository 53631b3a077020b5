"""The console for tables."""

from __future__ import annotations

import sys

from rich.console import Console

#: Columns of a table in a file or a log.
_WIDTH = 200


def wide_console() -> Console:
    """Standard output, as wide as the terminal; elsewhere wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH)
