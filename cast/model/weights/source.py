"""A flat dictionary of tensors from a path, a state dict or a module."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cast.model.weights.torchscript import is_torchscript, read_torchscript

Source = str | os.PathLike[str] | Mapping[str, object] | nn.Module

#: Keys under which training codes keep the weights in a checkpoint: plain torch, VideoMAE, DeepSpeed.
_CONTAINERS = ("state_dict", "model", "module")
#: Keys under which they keep a moving average of the weights: timm, VideoMAE, mmengine, and others' own loops.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
#: Counters of steps beside an average: mmengine, PyTorch.
_COUNTERS = ("steps", "n_averaged")
#: DeepSpeed's name for the weights' file in a checkpoint's directory.
DEEPSPEED = "mp_rank_00_model_states.pt"
#: Files of weights in a directory, in order of preference: safetensors, transformers, DeepSpeed.
_FILES = ("model.safetensors", "pytorch_model.bin", DEEPSPEED)
#: Prefixes that wrappers add to keys: data parallelism, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")

_log = logging.getLogger(__name__)


def read_tensors(source: Source, trust_pickle: bool = False) -> dict[str, Tensor]:
    """Tensors by name, without containers and wrappers' prefixes.

    If a checkpoint has weights and a moving average of them (EMA), the weights are taken, and a warning says so. If it
    has only the average, the average is taken.

    Args:
        source: a file (safetensors, torch, TorchScript archive), a directory with one, a state dict, a module.
        trust_pickle: whether a torch file may run code while it loads. Set it only for files whose author you trust.
            Files that have only tensors and plain containers do not need it. Nor do TorchScript archives: their tensors
            are read without running their program.

    Raises:
        FileNotFoundError: no such file, or a directory without a known one.
        ValueError: a file that cannot be read, or not without running its code.
        TypeError: a source of another kind, or a state dict with something other than tensors.
    """
    if isinstance(source, nn.Module):
        found: Mapping[str, object] = source.state_dict()
    elif isinstance(source, Mapping):
        found = source
    elif isinstance(source, str | os.PathLike):
        found = _read_file(weights_file(source), trust_pickle)
    else:
        raise TypeError(f"weights came as {type(source).__name__}; give a path, a state dict or a module")
    found = _open_containers(found)
    strange = sorted(str(key) for key, value in found.items() if not isinstance(value, Tensor))
    if strange:
        raise TypeError(f"the state dict holds something other than tensors under: {', '.join(strange)}")
    tensors = {str(key): value.detach() for key, value in found.items() if isinstance(value, Tensor)}
    return strip_prefixes(tensors, _WRAPPERS)


def strip_prefixes(tensors: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, Tensor]:
    """Remove the prefixes from every key, repeatedly.

    Raises:
        ValueError: two keys become the same.
    """
    stripped: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key
        while prefix := next((p for p in prefixes if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        if name in stripped:
            raise ValueError(f"the checkpoint has {name!r} twice, with and without a prefix; which one is meant?")
        stripped[name] = tensor
    return stripped


def weights_file(source: str | os.PathLike[str]) -> Path:
    """The file of the weights: `source` itself, or the preferred one of a directory.

    Raises:
        FileNotFoundError: no such file, or a directory without a known one.
    """
    path = Path(source)
    if path.is_dir():
        for name in _FILES:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"{path} has none of {', '.join(_FILES)}; name the file itself")
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    return path


def _read_file(path: Path, trust_pickle: bool) -> Mapping[str, object]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_torchscript(path):
            return read_torchscript(path)
        # Published checkpoints contain their training arguments as a Namespace, which has attributes and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except Exception as error:  # torch and safetensors raise many types on damaged files, KeyError among them
        raise ValueError(f"cannot read {path}: {_reason(error, trust_pickle)}") from None
    if isinstance(content, nn.Module):
        return content.state_dict()
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a state dict or a checkpoint with one")
    return content


def _reason(error: Exception, trust_pickle: bool) -> str:
    """The reason in one line; torch's own message advises arguments that these functions do not have."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and refused and not trust_pickle:
        return (
            f"it holds more than tensors ({refused[1]}), and reading that runs code that its author chose. If you "
            "trust the author, pass trust_pickle=True (in a command --trust_pickle, in a recipe "
            "experts.trust_pickle=true); else have it converted to safetensors"
        )
    return f"damaged, or no checkpoint ({type(error).__name__}: {(str(error) or 'empty').splitlines()[0]})"


def _open_containers(found: Mapping[str, object]) -> Mapping[str, object]:
    weights, average = _inside(found, _CONTAINERS), _inside(found, _AVERAGES)
    if weights and average:
        _log.warning(
            "the checkpoint has weights under %r and others under %r: the former are taken. timm and VideoMAE keep the "
            "trained weights there and their moving average in the other place, mmengine the reverse; for the other "
            "ones, load the file and pass its part %r",
            weights[0], average[0], average[0],
        )  # fmt: skip
    if weights:
        return _open_containers(weights[1])
    if average:
        return {key: value for key, value in _open_containers(average[1]).items() if key not in _COUNTERS}
    return found


def _inside(found: Mapping[str, object], names: Iterable[str]) -> tuple[str, Mapping[str, object]] | None:
    """The first name with tensors or another container under it, and that part."""
    for name in names:
        inner = found.get(name)
        if isinstance(inner, Mapping) and inner:
            return name, inner
    return None
