"""The two experts alone: CLIP's image tower and VideoMAE's encoder, under the names of their own checkpoints.

CAST has the same layers inside its blocks. These modules serve to train small experts, to check weights, and as
baselines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cast.model.config import CASTConfig, make_config
from cast.model.layers import (
    CLIP_EPS,
    VMAE_EPS,
    CLIPAttention,
    CLIPMlp,
    Names,
    Running,
    TubeletEmbedding,
    VideoMAEAttention,
    VideoMAEMlp,
    attend,
    embed_frames,
    feed_forward,
    init_linears,
)
from cast.model.positions import FixedPositions
from cast.model.weights.assign import assign
from cast.model.weights.clip import fit_positions, read_clip
from cast.model.weights.source import Source
from cast.model.weights.videomae import read_videomae
from cast_kernels import attention as attentions

#: Layers of the two halves of a block.
CLIP_NAMES = (Names("ln_1", "attn"), Names("ln_2", "mlp"))
VMAE_NAMES = (Names("norm1", "attn"), Names("norm2", "mlp"))


class CLIPBlock(nn.Module):
    """[frames, 1+N, D] -> the same."""

    def __init__(self, config: CASTConfig, running: Running) -> None:
        super().__init__()
        self.running = running
        self.ln_1: nn.LayerNorm = nn.LayerNorm(config.embed_dim, eps=CLIP_EPS)
        self.attn: CLIPAttention = CLIPAttention(config.embed_dim, config.num_heads)
        self.ln_2: nn.LayerNorm = nn.LayerNorm(config.embed_dim, eps=CLIP_EPS)
        self.mlp: CLIPMlp = CLIPMlp(config.embed_dim, config.mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = attend(x, self.ln_1, self.attn, None, self.running, CLIP_NAMES[0])
        return feed_forward(x, self.ln_2, self.mlp, None, None, self.running, CLIP_NAMES[1])


class VideoMAEBlock(nn.Module):
    """[B, T*N, D] -> the same."""

    def __init__(self, config: CASTConfig, running: Running) -> None:
        super().__init__()
        self.running = running
        self.norm1: nn.LayerNorm = nn.LayerNorm(config.embed_dim, eps=VMAE_EPS)
        self.attn: VideoMAEAttention = VideoMAEAttention(config.embed_dim, config.num_heads)
        self.norm2: nn.LayerNorm = nn.LayerNorm(config.embed_dim, eps=VMAE_EPS)
        self.mlp: VideoMAEMlp = VideoMAEMlp(config.embed_dim, config.mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = attend(x, self.norm1, self.attn, None, self.running, VMAE_NAMES[0])
        return feed_forward(x, self.norm2, self.mlp, None, None, self.running, VMAE_NAMES[1])


class _Expert(nn.Module):
    """Shared by both experts: heads, and a forward that ends in them."""

    def __init__(self, config: CASTConfig, heads: Mapping[str, int] | None) -> None:
        super().__init__()
        self.config = config
        self.heads: nn.ModuleDict = nn.ModuleDict(
            {name: nn.Linear(config.embed_dim, n) for name, n in (heads or {}).items()}
        )

    def tokens(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits by head, [B, classes]; without heads, the pooled features [B, D] under the name `features`."""
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()} or {"features": features}


class SpatialExpert(_Expert):
    """CLIP's image tower (ViT, QuickGELU), with the names of OpenAI's and open_clip's `visual`.

    Args:
        variant: a name in `cast.VARIANTS`, or a CASTConfig; only the experts' sizes are read.
        heads: name -> classes; linear heads on the pooled features, to train the expert alone.
        fused: whether blocks may run in compiled kernels; if not, they run in eager PyTorch.
        attention: the attention kernel, as in :class:`cast.CAST`.
        overrides: fields of CASTConfig.
    """

    def __init__(
        self,
        variant: str | CASTConfig = "base",
        heads: Mapping[str, int] | None = None,
        fused: bool = True,
        attention: str = "auto",
        **overrides: Any,
    ) -> None:
        super().__init__(make_config(variant, **overrides), heads)
        config, dim = self.config, self.config.embed_dim
        running = Running("auto" if fused else "eager", attention=attentions.check_name(attention))
        self.class_embedding: nn.Parameter = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.positional_embedding: nn.Parameter = nn.Parameter(torch.randn(1 + config.num_patches, dim) * dim**-0.5)
        self.conv1: nn.Conv2d = nn.Conv2d(3, dim, config.patch_size, config.patch_size, bias=False)
        self.ln_pre: nn.LayerNorm = nn.LayerNorm(dim, eps=CLIP_EPS)
        self.transformer: nn.Module = nn.Module()
        self.transformer.resblocks = nn.ModuleList(CLIPBlock(config, running) for _ in range(config.depth))
        self.ln_post: nn.LayerNorm = nn.LayerNorm(dim, eps=CLIP_EPS)
        init_linears(self)

    def load(self, source: Source, trust_pickle: bool = False) -> SpatialExpert:
        """Take CLIP's weights: OpenAI's TorchScript archive, or open_clip, timm, transformers, SpatialExpert layout.

        Positions of another image size are interpolated.

        Args:
            source: path, state dict or module.
            trust_pickle: whether a torch file may run code while it loads; never needed for TorchScript archives.

        Raises:
            ValueError: missing keys, unknown keys, other shapes (all are listed), or an unreadable file.
        """
        target = {key: tensor for key, tensor in self.state_dict().items() if not key.startswith("heads.")}
        given, unknown = read_clip(source, trust_pickle)
        assign("CLIP checkpoint", target, fit_positions(given, len(self.positional_embedding)), unknown)
        return self

    def embed(self, x: Tensor) -> Tensor:
        """Frames [B, 3, H, W], normalised -> [B, 1+N, D] before the first block."""
        size = self.config.image_size
        check_shape("frames", x, (3, size, size))
        return embed_frames(x, self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre)

    def tokens(self, x: Tensor) -> Tensor:
        """Frames [B, 3, H, W], normalised -> [B, 1+N, D] after the last block, before `ln_post`."""
        x = self.embed(x)
        for block in self.transformer.get_submodule("resblocks").children():
            x = block(x)
        return x

    def features(self, x: Tensor) -> Tensor:
        """Frames [B, 3, H, W] -> `ln_post` of CLS, [B, D], before CLIP's projection to text space."""
        return self.ln_post(self.tokens(x)[:, 0])


class TemporalExpert(_Expert, FixedPositions):
    """VideoMAE's encoder (joint space-time ViT), with the names of the official fine-tuning code.

    Args:
        variant: a name in `cast.VARIANTS`, or a CASTConfig; only the experts' sizes are read.
        heads: name -> classes; linear heads on the pooled features, to train the expert alone.
        fused: whether blocks may run in compiled kernels; if not, they run in eager PyTorch.
        attention: the attention kernel, as in :class:`cast.CAST`.
        overrides: fields of CASTConfig.
    """

    def __init__(
        self,
        variant: str | CASTConfig = "base",
        heads: Mapping[str, int] | None = None,
        fused: bool = True,
        attention: str = "auto",
        **overrides: Any,
    ) -> None:
        super().__init__(make_config(variant, **overrides), heads)
        config, dim = self.config, self.config.embed_dim
        running = Running("auto" if fused else "eager", attention=attentions.check_name(attention))
        self.patch_embed: TubeletEmbedding = TubeletEmbedding(dim, config.tubelet_size, config.patch_size)
        self.place_tokens(config.exchange_frames * config.num_patches, dim)
        self.blocks: nn.ModuleList = nn.ModuleList(VideoMAEBlock(config, running) for _ in range(config.depth))
        self.fc_norm: nn.LayerNorm = nn.LayerNorm(dim, eps=VMAE_EPS)
        init_linears(self)

    def load(self, source: Source, trust_pickle: bool = False) -> TemporalExpert:
        """Take VideoMAE's weights: official (pre-trained or fine-tuned), MMAction2, transformers, TemporalExpert.

        The model computes positions from its own number of tokens, so weights of another image size fit.

        Args:
            source: path, state dict or module.
            trust_pickle: whether a torch file may run code while it loads.

        Raises:
            ValueError: missing keys, unknown keys, other shapes (all are listed), or an unreadable file. `fc_norm` may
                be absent, as after pre-training; the model then keeps its own.
        """
        given, unknown = read_videomae(source, trust_pickle)
        target = {key: tensor for key, tensor in self.state_dict().items() if not key.startswith("heads.")}
        if not any(key.startswith("fc_norm.") for key in given):
            target = {key: tensor for key, tensor in target.items() if not key.startswith("fc_norm.")}
        assign("VideoMAE checkpoint", target, given, unknown)
        return self

    def embed(self, x: Tensor) -> Tensor:
        """Clips [B, 3, frames, H, W], normalised -> [B, T*N, D] before the first block."""
        config = self.config
        check_shape("clips", x, (3, config.num_frames, config.image_size, config.image_size))
        return self.patch_embed(x) + self.pos_embed

    def tokens(self, x: Tensor) -> Tensor:
        """Clips [B, 3, frames, H, W], normalised -> [B, T*N, D] after the last block, before `fc_norm`."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x

    def features(self, x: Tensor) -> Tensor:
        """Clips [B, 3, frames, H, W] -> `fc_norm` of the mean over all tokens, [B, D]."""
        return self.fc_norm(self.tokens(x).mean(1))


def check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    """Check that `x` is floating-point [B, *expected]; otherwise raise a ValueError or TypeError that names what `x`
    is.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} came as {type(x).__name__}; the model takes a tensor")
    if tuple(x.shape[1:]) != expected or x.dim() != 1 + len(expected):
        wanted = ", ".join(map(str, ("B", *expected)))
        raise ValueError(
            f"{name} have shape {list(x.shape)}; this model takes [{wanted}] (batch, channels"
            f"{', frames' if len(expected) == 4 else ''}, height, width)"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} are {x.dtype}; the model takes normalised floating-point pixels")
