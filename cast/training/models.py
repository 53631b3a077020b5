"""The model that a recipe asks for, with its experts' weights, and the finished one as a directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cast.config import CASTConfig, make_config
from cast.model import CAST, TRAINABLE, load_official_checkpoint
from cast.training.settings import TrainSettings
from cast.training.tensors import read_weights


def configure(settings: TrainSettings, classes: Mapping[str, Sequence[str]]) -> CASTConfig:
    """The recipe's model with the data's heads.

    Raises:
        ValueError: the recipe names other heads than the data has.
    """
    heads = {head: len(names) for head, names in classes.items()}
    default = CASTConfig().heads
    if settings.model.heads != default and settings.model.classes != heads:
        raise ValueError(f"model.heads is {settings.model.classes}, the data has {heads}: leave model.heads out")
    return make_config(settings.model, heads=heads)


def build(settings: TrainSettings, classes: Mapping[str, Sequence[str]]) -> tuple[CAST, list[str]]:
    """CAST as it is before the first step, in fp32 on the CPU.

    Returns:
        The model, and what a person should know about its weights.

    Raises:
        ValueError: no weights for an expert that stays frozen, or weights that do not fit.
        FileNotFoundError: no such file.
    """
    experts, run = settings.experts, settings.run
    torch.manual_seed(settings.seed)
    model = CAST(configure(settings, classes), fused=run.fused, recompute=run.recompute, attention=run.attention)
    missing = [name for name in ("clip", "videomae") if not (getattr(experts, name) or experts.cast)]
    if missing and not experts.train:
        raise ValueError(
            f"experts.{missing[0]} names no weights, and experts stay frozen: a frozen expert that knows nothing "
            "teaches nothing. Give the file (docs/training.md says where weights come from), a whole CAST as "
            "experts.cast, or experts.train=true to train them too"
        )
    notes = []
    if experts.cast:
        notes += _start_from(model, experts.cast, experts.trust_pickle)
    else:
        _initialise(model, missing)
        model.load_experts(experts.clip, experts.videomae, experts.trust_pickle)
        notes += [f"expert {name} starts from nothing" for name in missing]
    if experts.train:
        model.requires_grad_(True)
    return model, notes


def _start_from(model: CAST, source: str, trust_pickle: bool) -> list[str]:
    """Copy a whole CAST; heads with another number of classes stay new."""
    path = Path(source)
    whole = CAST.from_pretrained(path) if path.is_dir() else load_official_checkpoint(path, trust_pickle=trust_pickle)
    given, own = whole.state_dict(), model.state_dict()
    fresh = [key for key in own if key.startswith("head") and (key not in given or given[key].shape != own[key].shape)]
    differing = [
        key for key in own if key not in fresh and (key not in given or given[key].shape != own[key].shape)
    ] + [key for key in given if key not in own and not key.startswith("head")]
    # The last adapters belong to the one-head layout; they may come or go with the heads.
    differing = [key for key in differing if "_last_Adapter" not in key]
    if differing:
        raise ValueError(f"experts.cast={source} does not fit the recipe's model: {', '.join(differing[:8])} differ")
    taken = {key: tensor for key, tensor in given.items() if key in own and key not in fresh}
    model.load_state_dict(taken, strict=False)
    return [f"new heads, as the classes differ: {', '.join(fresh)}"] if fresh else []


def _initialise(model: CAST, experts: Sequence[str]) -> None:
    """Glorot's initialisation for the matrices of experts that start from nothing, as VideoMAE's pre-training has it.

    The standard deviation of fine-tuned models, 0.02, suits a width of 768; in small models the signal all but
    vanishes with it.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name.endswith("weight") and not TRAINABLE.search(name):
            owner = "clip" if "clip_" in name else "videomae"
            if owner in experts:
                nn.init.xavier_uniform_(parameter.detach().flatten(1))


def compile_blocks(model: nn.Module, backend: str) -> None:
    """torch.compile of each block in place: names stay, and equal blocks are compiled once.

    Raises:
        ValueError: no such backend.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"run.compile is {backend!r}; it must be null or one of {', '.join(known)}")
    blocks = getattr(model, "blocks", None)
    for module in blocks if isinstance(blocks, nn.ModuleList) else [model]:
        module.compile(backend=backend)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor, not sharded, on the CPU; a call for all processes."""
    return read_weights(model, everything=True)


def save_finished(
    config: CASTConfig, tensors: Mapping[str, Tensor], classes: Mapping[str, Sequence[str]], directory: Path
) -> None:
    """A directory that `CAST.from_pretrained` and `cast predict --checkpoint` load; class names go into labels.json."""
    model = CAST(config)
    model.load_state_dict(tensors)
    model.save_pretrained(directory)
    names = {head: list(own) for head, own in classes.items()}
    (directory / "labels.json").write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
