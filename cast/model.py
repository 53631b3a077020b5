"""`CAST`: two frozen experts, adapters, and an exchange in every block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cast.block import CASTBlock
from cast.config import CASTConfig, make_config
from cast.experts import check_shape
from cast.heads import apply_heads, build_heads
from cast.layers import CLIP_EPS, VMAE_EPS, TubeletEmbedding, embed_frames, sincos_table

#: Parameters that train: exchange, adapters, final norms, heads. The experts stay frozen (paper section 3).
TRAINABLE = re.compile(r"cross|Adapter|^clip_ln_post\.|^vmae_fc_norm\.|^head")


class CAST(nn.Module):
    """Cross-Attention in Space and Time (arXiv 2311.18825), with the published code's semantics and names.

    `state_dict()` has the official layout, so published checkpoints load by name. Only adapters, exchange,
    final norms and heads require gradients.

    Args:
        variant: a name in `cast.VARIANTS`, or a CASTConfig.
        heads: name -> classes: one head under any name ({"action": 400} if None), or {"verb": 97, "noun": 300}.
        fused: whether the exchange may run in a compiled kernel; if not, it runs in eager PyTorch.
        overrides: fields of CASTConfig.

    Raises:
        TypeError: an override that CASTConfig does not have.
        ValueError: an unknown variant, or a value that no model can have.
    """

    pos_embed: Tensor

    def __init__(
        self,
        variant: str | CASTConfig = "base",
        heads: Mapping[str, int] | None = None,
        fused: bool = True,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.config = config = make_config(variant, heads, **overrides)
        dim = config.embed_dim
        self.clip_class_embedding = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.clip_positional_embedding = nn.Parameter(torch.randn(1 + config.num_patches, dim) * dim**-0.5)
        self.patch_embed = TubeletEmbedding(dim, config.tubelet_size, config.patch_size)
        self.clip_conv1 = nn.Conv2d(3, dim, config.patch_size, config.patch_size, bias=False)
        self.clip_ln_pre = nn.LayerNorm(dim, eps=CLIP_EPS)
        backend = "auto" if fused else "eager"
        self.blocks = nn.ModuleList(CASTBlock(config, index, backend) for index in range(config.depth))
        self.clip_ln_post = nn.LayerNorm(dim, eps=CLIP_EPS)
        self.vmae_fc_norm = nn.LayerNorm(dim, eps=VMAE_EPS)
        for name, module in build_heads(config).items():
            self.add_module(name, module)
        # Not persistent: published checkpoints do not have it.
        table = sincos_table(config.exchange_frames * config.num_patches, dim)
        self.register_buffer("pos_embed", table, persistent=False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(TRAINABLE.search(name) is not None)

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """Name the action.

        Args:
            video: [B, 3, frames, H, W], floating-point, normalised with ImageNet's mean and deviation.

        Returns:
            Logits by head, [B, classes].

        Raises:
            ValueError, TypeError: another shape, or integer pixels.
        """
        return apply_heads(self, self.config, *self.features(video))

    def features(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video -> pooled and normalised (spatial, temporal) features, [B, D] each: what the heads see."""
        spatial, temporal = self.tokens(video)
        # Both norms come after the mean.
        return self.clip_ln_post(spatial[:, :, 0].mean(1)), self.vmae_fc_norm(temporal.flatten(1, 2).mean(1))

    def tokens(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video -> spatial [B, T, 1+N, D] and temporal [B, T, N, D] after the last block."""
        spatial, temporal = self.embed(video)
        for block in self.blocks:
            spatial, temporal = block(spatial, temporal)
        return spatial, temporal

    def embed(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video -> spatial [B, T, 1+N, D] and temporal [B, T, N, D] before the first block."""
        config, batch = self.config, len(video)
        check_shape("videos", video, (3, config.num_frames, config.image_size, config.image_size))
        # The last frame of each tubelet: the 2nd, 4th, ... of 16 (the paper's "even" frames).
        frames = video[:, :, config.tubelet_size - 1 :: config.tubelet_size].transpose(1, 2).flatten(0, 1)
        spatial = embed_frames(
            frames, self.clip_conv1, self.clip_class_embedding, self.clip_positional_embedding, self.clip_ln_pre
        )
        temporal = self.patch_embed(video) + self.pos_embed
        grid = (config.exchange_frames, config.num_patches)
        return spatial.unflatten(0, (batch, grid[0])), temporal.unflatten(1, grid)

    def fuse(self, backend: str = "auto") -> CAST:
        """Let the exchange run in the fastest backend that can (or the one named), from the next call on."""
        for block in self.blocks:
            assert isinstance(block, CASTBlock)
            block.backend = backend
        return self

    def unfuse(self) -> CAST:
        """Let the exchange run in eager PyTorch from the next call on: the same mathematics."""
        return self.fuse("eager")
