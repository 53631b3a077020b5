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

#: Work -> the phases that it consists of.
_PHASES = {"inference": ("inference",), "training": ("forward", "backward")}


def predicted(machine: Machine, device: str, kind: str, batch: int, work: str) -> dict[str, float]:
    """Row -> milliseconds of B-CAST at the paper's size; empty if there is no prediction for this GPU or problem."""
    if device != "cuda" or kind != "bf16":
        return {}
    entry = prediction_of(machine.describe(), PREDICTIONS)
    for one in entry.get("batches", ()):
        if one["batch"] == batch:
            mine = next(name for name in ours("cuda", False) if name.endswith("triton"))
            return {mine: sum(one["us"][phase] for phase in _PHASES[work]) / 1e3}
    return {}


def predicted_model(machine: Machine, device: str, kind: str, batch: int, work: str) -> dict[str, float]:
    """Row -> milliseconds of a whole CAST-B's GPU, as a graph runs it; empty if there is no prediction of it."""
    if device != "cuda" or kind != "amp":
        return {}
    mine = next(name for name in ours("cuda", False) if name.endswith("triton"))
    names = {"eager AMP": "fused=False", "torch.compile": "torch.compile(fused=False)", "ours": mine}
    gpu = machine.describe()
    ways = prediction_of(gpu, PREDICTIONS / "model").get("ways", []) if prediction_of(gpu, PREDICTIONS) else []
    asked = (batch, work == "training step", "fp32")
    return {
        names[way["way"]]: way["gpu_us"] / 1e3
        for way in ways
        if (way["model"]["batch"], way["model"]["training"], way["model"]["streams"]) == asked and way["way"] in names
    }


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
            if "devices" not in found:
                return found
            (entry,) = found["devices"].values()
            return dict(entry) if entry["constants"]["multiprocessors"] == gpu["multiprocessors"] else {}
    return {}


@cache
def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found
