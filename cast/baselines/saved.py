"""A baseline as a directory: `config.json` with its construction, and `model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from cast.ground.files import read_json
from cast.model.weights.assign import assign
from cast.model.weights.source import read_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_saved(model: nn.Module, about: Mapping[str, Any], directory: str | os.PathLike[str]) -> None:
    """Write a model and its construction; a kill during the writing leaves an old checkpoint whole."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    save_file(tensors, path / f"{WEIGHTS}.part", metadata={"format": "pt"})
    (path / f"{CONFIG}.part").write_text(json.dumps(about, indent=2) + "\n")
    for name in (WEIGHTS, CONFIG):
        os.replace(path / f"{name}.part", path / name)


def read_saved(directory: str | os.PathLike[str], key: str) -> dict[str, Any]:
    """The construction of a saved baseline.

    Args:
        directory: of `save_pretrained`.
        key: the entry that the configuration of this kind of model must have.

    Raises:
        FileNotFoundError: no `config.json`.
        ValueError: it is no JSON, or belongs to another kind of model.
    """
    path = Path(directory) / CONFIG
    about = read_json(path)
    if not isinstance(about, dict) or key not in about:
        raise ValueError(
            f"{path} names no {key}; a plain CAST is read by cast.CAST.from_pretrained, a baseline of any kind by "
            "cast.baselines.read_baseline"
        )
    return about


def load_saved(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Load the saved tensors into a model of the same construction.

    Raises:
        FileNotFoundError: no `model.safetensors`.
        ValueError: other tensors than the model's; all are listed.
    """
    assign(str(directory), model.state_dict(), read_tensors(Path(directory) / WEIGHTS))
