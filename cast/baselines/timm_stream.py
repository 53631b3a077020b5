"""An image model of timm as an expert: IN-21K's ViT (Table 5), EVA-02 (Table 7), and similar models."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cast.baselines.streams import ExpertStream, rows
from cast.ground.optional import require
from cast.model.config import CASTConfig
from cast.model.layers import Adapter, Running
from cast.model.weights.assign import assign
from cast.model.weights.source import Source, read_tensors, strip_prefixes

#: Modules of timm whose models have the layers that this stream calls.
_BUILDS = ("timm.models.vision_transformer", "timm.models.eva")
#: Tensors of a checkpoint that an expert does not need: classifiers, and the text tower of a contrastive pair.
_NOT_NEEDED = ("head.", "fc_norm.", "text.", "logit_scale", "logit_bias", "visual.head.")


class TimmStream(ExpertStream):
    """A vision transformer of timm (VisionTransformer or Eva) on single frames; CLS is the pooled token.

    Runs in timm's own PyTorch code; the fused kernels do not replace it.

    Args:
        name: a name of `timm.list_models()`, for example `vit_base_patch16_224` or `eva02_base_patch16_clip_224`.
        config: its width, depth and grid must be the model's.
        running: only its `math` attention has an effect on timm's code.
        pretrained: whether timm downloads the weights of this name.
        options: passed to `timm.create_model`; `img_size=196` gives a model with patches of 14 the grid of 14 x 14, and
            frames are then resized to it.

    Raises:
        MissingExtraError: timm is not installed.
        ValueError: another width, depth or grid, tokens beside CLS and patches, or another kind of model.
    """

    prefix = 1

    def __init__(
        self, name: str, config: CASTConfig, running: Running, pretrained: bool = False, **options: Any
    ) -> None:
        super().__init__(config, running)
        timm = require("timm", "timm")
        if not timm.is_model(name.split(".")[0]):
            raise ValueError(
                f"timm has no model {name!r}; see timm.list_models('vit_*') and timm.list_models('eva02_*')"
            )
        if timm.model_entrypoint(name.split(".")[0]).__module__ not in _BUILDS:
            raise ValueError(f"{name} is not built as a VisionTransformer or Eva; choose a vit_* or eva02_* model")
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="token", **options)
        self._check(name, model)
        if running.attention == "math":
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False
        self.expert: Any = model
        self.size: Any = model.patch_embed.img_size

    def _check(self, name: str, model: Any) -> None:
        if getattr(model, "rope_mixed", False) or model.cls_token is None or model.num_prefix_tokens != 1:
            raise ValueError(
                f"{name} has no CLS, tokens beside CLS and patches, or positions that differ by block; the exchange "
                "needs patches and one CLS"
            )
        found = (model.embed_dim, len(model.blocks), *model.patch_embed.grid_size)
        wanted = (self.config.embed_dim, self.config.depth, self.config.grid, self.config.grid)
        if found != wanted:
            raise ValueError(
                f"{name} has (width, depth, rows, columns) {found}, the configuration {wanted}: both experts need the "
                "same; img_size=196 gives patches of 14 a grid of 14 x 14"
            )

    def embed(self, video: Tensor) -> Tensor:
        frames = self.frames(video)
        if tuple(frames.shape[-2:]) != tuple(self.size):
            frames = F.interpolate(frames, self.size, mode="bilinear", antialias=True)
        placed = self.expert._pos_embed(self.expert.patch_embed(frames))
        x = placed[0] if isinstance(placed, tuple) else placed  # Eva also returns the rotation
        return self.expert.norm_pre(x).unflatten(0, (video.shape[0], -1))

    def attend(self, index: int, x: Tensor, adapter: Adapter | None) -> Tensor:
        block, frames = self.expert.blocks[index], x.flatten(0, 1)
        rope = getattr(self.expert, "rope", None)
        rotation = {} if rope is None else {"rope": rope.get_embed()}
        a = _scale(block, "ls1", "gamma_1", block.attn(block.norm1(frames), **rotation))
        a = a if adapter is None else a + adapter(a)
        return x + a.view_as(x)

    def feed(self, index: int, x: Tensor, adapter: Adapter | None, factor: Tensor | None) -> Tensor:
        block = self.expert.blocks[index]
        normal = block.norm2(x)
        # timm's SwiGLU takes [batch, tokens, channels].
        fed = _scale(block, "ls2", "gamma_2", block.mlp(normal.flatten(0, 1)).view_as(x))
        if adapter is None:
            return x + fed
        added, scale = 0.5 * adapter(normal), rows(factor)
        return x + fed + (added if scale is None else added * scale[..., None])

    def pool(self, x: Tensor) -> Tensor:
        return self.last_norm()(x[:, :, 0].mean(1))

    def last_norm(self) -> nn.LayerNorm:
        norm: nn.LayerNorm = self.expert.norm
        return norm

    def load(self, source: Source, trust_pickle: bool = False) -> None:
        """Load weights in timm's layout, in open_clip's around a timm trunk, or in another that timm translates."""
        tensors = strip_prefixes(read_tensors(source, trust_pickle), ("visual.trunk.",))
        translate = getattr(sys.modules[type(self.expert).__module__], "checkpoint_filter_fn", None)
        if translate is not None:
            tensors = translate(dict(tensors), self.expert)
        given = {key: tensor for key, tensor in tensors.items() if not key.startswith(_NOT_NEEDED)}
        target: Mapping[str, Tensor] = self.expert.state_dict()
        assign("timm checkpoint", target, given)


def _scale(block: Any, layer: str, vector: str, x: Tensor) -> Tensor:
    """Layer scale under VisionTransformer's or Eva's name, if the block has one."""
    if hasattr(block, layer):
        return getattr(block, layer)(x)
    gamma = getattr(block, vector, None)
    return x if gamma is None else x * gamma
