"""Where tables go."""

from __future__ import annotations

import sys

from rich.console import Console

#: Columns of a table that goes to a file or a log, where nobody can widen the window.
_WIDTH = 200


def wide_console() -> Console:
    """Standard output: as wide as the terminal, or wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH)
