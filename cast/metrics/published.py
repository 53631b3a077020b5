"""Published figures of CAST and of other methods from `published.yaml`, each with its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cast.ground.files import parse_yaml

PUBLISHED = Path(__file__).with_suffix(".yaml")


def read_published() -> dict[str, Any]:
    """The file's sections by name. A table has `source`, `columns` and `rows`."""
    content: dict[str, Any] = parse_yaml(PUBLISHED.read_text(encoding="utf-8"))
    return content
