"""The models of the tables' rows, in miniature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cast import CAST, CASTConfig
from cast.baselines import DESIGNS, SingleExpert, TwoStream
from cast.demo.models import CONFIG, HEADS, initialise, spatial_expert, temporal_expert
from cast.ground.optional import require
from cast.model.config import make_config
from cast.study.tables import Model

#: Four blocks: the paper's last 3, 6 and 9 of 12 layers become the last 1, 2 and 3.
MINIATURE = CASTConfig(**CONFIG.to_dict() | {"depth": 4})

#: Expert -> its first data, `pictures` (rendered stills) or `clips` (plain clips), and their labels.
EXPERTS: Mapping[str, tuple[str, str]] = {
    "clip": ("pictures", "noun"),
    "videomae": ("clips", "verb"),
    # These labels stand for IN-21K's classes, which differ from the task's: odd or even.
    "timm:vit_base_patch16_224.augreg_in21k": ("pictures", "parity"),
    "timm:eva02_base_patch16_clip_224": ("pictures", "noun"),
}
CLASSES = {"noun": HEADS["noun"], "verb": HEADS["verb"], "parity": 2}


def needed_experts(model: Model) -> set[str]:
    """Names of a model's experts."""
    if model.single:
        return {model.single[0]}
    return {DESIGNS[model.design].spatial, DESIGNS[model.design].temporal}


def small_expert(name: str, seed: int, config: CASTConfig = MINIATURE) -> nn.Module:
    """An expert with a head for its first labels, initialised."""
    if name == "clip":
        return spatial_expert(config, seed)
    if name == "videomae":
        return temporal_expert(config, seed)
    torch.manual_seed(seed)
    return initialise(PictureExpert(name, config))


class PictureExpert(nn.Module):
    """timm's model at the miniature's size, with a head: pictures [B, 3, H, W] -> logits by head."""

    def __init__(self, name: str, config: CASTConfig) -> None:
        super().__init__()
        self.body: Any = require("timm", "timm").create_model(
            name.removeprefix("timm:"), num_classes=0, global_pool="token", **timm_sizes(config)
        )
        self.label: str = EXPERTS[name][1]
        self.head: nn.Linear = nn.Linear(config.embed_dim, CLASSES[self.label])

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        return {self.label: self.head(self.body(pictures))}


def timm_sizes(config: CASTConfig) -> dict[str, Any]:
    """The configuration as timm's arguments."""
    names = {"image_size": "img_size", "patch_size": "patch_size", "embed_dim": "embed_dim"}
    names |= {"depth": "depth", "num_heads": "num_heads"}
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def expert_weights(name: str, expert: nn.Module) -> dict[str, Tensor]:
    """The tensors of a trained expert that a two-stream model loads."""
    own = expert.body.state_dict() if isinstance(expert, PictureExpert) else expert.state_dict()
    return {key: tensor.contiguous() for key, tensor in own.items()}


def miniature(
    model: Model, experts: Mapping[str, Mapping[str, Tensor]], seed: int, config: CASTConfig = MINIATURE
) -> nn.Module:
    """The row's model at the study's size, on pre-trained experts by name."""
    torch.manual_seed(seed)
    if model.single:
        single = initialise(SingleExpert(model.single[0], model.single[1], config))  # type: ignore[arg-type]
        return single.load_expert(experts[model.single[0]])
    config = make_config(config, **{"exchange_layers": model.layers(config.depth), **model.config})
    design = DESIGNS[model.design]
    if model.design == "cast":
        return initialise(CAST(config)).load_experts(clip=experts["clip"], videomae=experts["videomae"])
    roles = {"spatial": design.spatial, "temporal": design.temporal}
    options = {role: timm_sizes(config) for role, name in roles.items() if name.startswith("timm:")}
    both = initialise(TwoStream(design, config, timm_options=options))
    return both.load_experts(experts[design.spatial], experts[design.temporal])
