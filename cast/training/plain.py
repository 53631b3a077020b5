"""Settings as plain values: for checkpoints, logs and trackers."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def plain(settings: DataclassInstance) -> dict[str, Any]:
    """The settings as JSON values, by section."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return values


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    result: dict[str, Any] = {}
    for key, inner in value.items():
        result |= flat(inner, f"{prefix}.{key}" if prefix else key)
    return result
