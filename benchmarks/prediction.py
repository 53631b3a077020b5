"""What `cast-kernels predict` expects of a GPU, for the rows that it has a model of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from variants import ours

from cast_kernels.gpu.machine import Machine

PREDICTIONS = Path(__file__).parent / "predictions"

#: What "auto" takes on the GPUs and batches that are predicted (`tests/test_recompute.py`), then another level.
_LEVELS = ("nothing", "cheap")
#: Work -> the phases that it consists of.
_PHASES = {"inference": ("inference",), "training": ("forward", "backward")}


def predicted(machine: Machine, device: str, kind: str, batch: int, work: str) -> dict[str, float]:
    """Row -> milliseconds of B-CAST at the paper's size; empty if there is no prediction for this GPU or problem."""
    if device != "cuda":
        return {}
    found = {}
    for level in _LEVELS if work == "training" else ("cheap",):
        entry = prediction_of(machine.describe(), PREDICTIONS / kind / level)
        for one in entry.get("batches", ()):
            if one["batch"] == batch:
                found[_mine(work, level)] = sum(one["us"][phase] for phase in _PHASES[work]) / 1e3
    return found


def predicted_model(machine: Machine, device: str, kind: str, batch: int, work: str) -> dict[str, float]:
    """Row -> milliseconds of a whole CAST-B's GPU, as a graph runs it; empty if there is no prediction of it."""
    if device != "cuda" or kind != "amp" or work not in ("inference", "training step"):
        return {}
    names = {"eager AMP": "fused=False", "torch.compile": "torch.compile(fused=False)"}
    asked = (batch, work == "training step", "fp32")
    found = {}
    for way in prediction_of(machine.describe(), PREDICTIONS / "model").get("ways", ()):
        model = way["model"]
        if (model["batch"], model["training"], model["streams"]) == asked:
            found[names.get(way["way"]) or _mine(work, model["recompute"])] = way["gpu_us"] / 1e3
    return found


def _mine(work: str, level: str) -> str:
    """The row of ours at a recompute level: the row without one is "auto", which takes what `_LEVELS` says first."""
    name = next(name for name in ours("cuda", False) if name.endswith("triton"))
    return name if work == "inference" or level == _LEVELS[0] else f"{name}, recompute={level}"


def prediction_of(gpu: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A GPU's entry in what `cast-kernels predict` wrote; empty if there is none.

    Args:
        gpu: `name`, in which the prediction's must be a word (a GH200 is no H200), and `multiprocessors`, of which it
            must have as many (an H100 PCIe is no H100 SXM), where the prediction says.
        folder: of the predictions.
    """
    words = re.findall(r"[A-Z0-9]+", gpu["name"].upper())
    if "NVL" in words:  # an H100 NVL has an SXM's multiprocessors, but another memory or power limit
        return {}
    for path in sorted(folder.glob("*.json")):
        if path.stem.upper() in words:
            found = _read(path)
            if "devices" in found:
                (found,) = found["devices"].values()
            return found if found["constants"]["multiprocessors"] == gpu["multiprocessors"] else {}
    return {}


@cache
def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found
