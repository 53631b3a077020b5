"""The weight decay and the learning rate of each parameter."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

#: Tables of positions and VideoMAE's mask token. The published codes exclude them from weight decay, except CLIP's own
#: table, `positional_embedding`.
_POSITIONS = re.compile(r"(_pos|time_positional_embedding|pos_embed|mask_token)$")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
#: Parameters before the first block, in CLIP's, VideoMAE's and timm's names.
_EMBEDDING = re.compile(
    r"(^|\.)((clip_)?(patch_embed|conv1|class_embedding|positional_embedding|ln_pre)"
    r"|cls_token|pos_embed|norm_pre|mask_token)\b"
)
#: Those that did not decay in an earlier version, and those that had the heads' learning rate in it.
_DECAYS_NOW = re.compile(r"(^|\.)(clip_)?positional_embedding$")
_SLOWER_NOW = re.compile(r"(^|\.)((clip_)?ln_pre|cls_token|pos_embed|norm_pre|mask_token)\b")


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameters that require gradients, by weight decay and by learning-rate scale.

    Vectors (biases and norms) and tables of positions do not decay, except CLIP's table, which does as in the published
    code.

    Args:
        model: any module; blocks are recognised by names with `blocks.<i>.`.
        weight_decay: of all other parameters.
        layer_decay: see :func:`layer_scale`.

    Returns:
        Groups for a PyTorch optimizer, each with `lr_scale`, the factor on the scheduled rate.

    Raises:
        ValueError: no parameter requires gradients.
    """
    names = [name for name, _ in model.named_parameters()]
    depth = max((int(match[1]) + 1 for match in map(_BLOCK.search, names) if match), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            without = parameter.ndim < 2 or _POSITIONS.search(name) is not None
            key = (0.0 if without else weight_decay, layer_scale(name, depth, layer_decay))
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ValueError(f"the {type(model).__name__} has no parameter that requires gradients: nothing can train")
    return [{"params": params, "weight_decay": wd, "lr_scale": scale} for (wd, scale), params in groups.items()]


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Learning-rate factor of a parameter: decay^(depth - i) in block i, decay^(depth + 1) before block 0, else 1.

    The decay of a block also applies to its new parameters (adapters, exchange), as in the published code.
    """
    if match := _BLOCK.search(name):
        return decay ** (depth - int(match[1]))
    return decay ** (depth + 1) if _EMBEDDING.search(name) else 1.0


def grouped_otherwise_before(model: nn.Module, weight_decay: float, layer_decay: float) -> bool:
    """Whether an earlier version gave some trained parameter another weight decay or rate (docs/training.md)."""
    return any(
        (weight_decay and _DECAYS_NOW.search(name)) or (layer_decay != 1 and _SLOWER_NOW.search(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )
