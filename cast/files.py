"""Writing whole files or none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Under another name first, so that a kill leaves the old file or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """UTF-8; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Indented, with a newline at the end; see :func:`write_bytes`."""
    write_text(path, json.dumps(value, indent=2) + "\n")
