"""Predictions by `cast-kernels predict` for the rows that have a model of a GPU."""

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

#: The level of "auto" for the predicted GPUs and batches (`tests/test_recompute.py`), then another level.
_LEVELS = ("nothing", "cheap")
#: Work -> its phases.
_PHASES = {"inference": ("inference",), "training": ("forward", "backward")}


def predicted(machine: Machine, device: str, kind: str, batch: int, work: str) -> dict[str, float]:
    """Row -> predicted milliseconds of B-CAST at the paper's size; empty if this GPU or problem has none."""
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
    """Row -> predicted milliseconds of a whole CAST-B as a graph on the GPU; empty without a prediction."""
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
    """Our row at a recompute level. The row without a level is "auto", whose level comes first in `_LEVELS`."""
    name = next(name for name in ours("cuda", False) if name.endswith("triton"))
    return name if work == "inference" or level == _LEVELS[0] else f"{name}, recompute={level}"


def prediction_of(gpu: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A GPU's entry in the files of `cast-kernels predict`; empty if there is none.

    Args:
        gpu: `name` and `multiprocessors`. The prediction's name must be a word of `name` (a GH200 is no H200), and its
            number of multiprocessors must be equal (an H100 PCIe is no H100 SXM).
        folder: of the predictions.
    """
    words = re.findall(r"[A-Z0-9]+", gpu["name"].upper())
    if "NVL" in words:  # an H100 NVL has as many multiprocessors as an SXM, but another memory or power limit
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
