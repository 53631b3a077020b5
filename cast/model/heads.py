"""The two published head layouts: one head over both experts, or verb and noun apart (paper appendix, Fig. 9)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cast.model.config import CASTConfig
from cast.model.layers import Adapter, init_linears


def build_heads(config: CASTConfig) -> dict[str, nn.Module]:
    """The head modules under their official top-level names, initialised."""
    dim, classes = config.embed_dim, config.classes
    if config.compositional:
        linears = {f"head_{name}": nn.Linear(dim, classes[name]) for name in ("verb", "noun")}
        modules: dict[str, nn.Module] = dict(linears)
    else:
        linears = {"head": nn.Linear(dim, sum(classes.values()))}
        adapters = {f"{name}_last_Adapter": Adapter(dim, config.adapter_dim) for name in ("noun", "verb")}
        modules = {**adapters, **linears}
    init_linears(*modules.values())
    for linear in linears.values():
        linear.weight.data.mul_(config.init_scale)
    return modules


def apply_heads(model: nn.Module, config: CASTConfig, spatial: Tensor, temporal: Tensor) -> dict[str, Tensor]:
    """Pooled features of either expert, [B, D] each -> logits by head, [B, classes]."""

    def run(name: str, x: Tensor) -> Tensor:
        return model.get_submodule(name)(x)

    def dropped(x: Tensor) -> Tensor:
        return F.dropout(x, config.head_dropout, model.training)

    if config.compositional:
        return {"verb": run("head_verb", dropped(temporal)), "noun": run("head_noun", dropped(spatial))}
    joined = run("noun_last_Adapter", spatial) + run("verb_last_Adapter", temporal)
    return {name: run("head", dropped(joined)) for name in config.classes}
