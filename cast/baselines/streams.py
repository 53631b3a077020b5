"""An expert as one stream of a two-stream model: its embedding, its half blocks, its pooling.

All streams have the same shape, [B, T, C+N, D]: each frame begins with `C` tokens that are no patches (CLIP's CLS, or
none).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cast.ground.renamed import renamed
from cast.model.config import CASTConfig
from cast.model.experts import CLIP_NAMES, VMAE_NAMES, CLIPBlock, SpatialExpert, TemporalExpert, VideoMAEBlock
from cast.model.layers import Adapter, Running, attend, attended, feed_forward
from cast.model.weights.assign import assign
from cast.model.weights.source import Source
from cast.model.weights.videomae import read_videomae
from cast_kernels import plain


class ExpertStream(nn.Module):
    """The interface of an expert in a two-stream model, for both roles.

    Attributes:
        prefix: C, tokens of a frame before its patches.
        running: how the ops of its blocks run.
    """

    config: CASTConfig
    running: Running

    prefix: int

    def __init__(self, config: CASTConfig, running: Running) -> None:
        super().__init__()
        self.config, self.running = config, running

    def embed(self, video: Tensor) -> Tensor:
        """[B, 3, frames, H, W], normalised -> [B, T, C+N, D] before the first block."""
        raise NotImplementedError

    def attend(self, index: int, x: Tensor, adapter: Adapter | None) -> Tensor:
        """First half of block `index`: x + a + adapter(a), where a is the self-attention of the normalised x."""
        raise NotImplementedError

    def attend_over_time(self, index: int, x: Tensor, adapter: Adapter) -> Tensor:
        """AIM's extra step before `attend`: x + adapter(a), where a is the block's own attention along time."""
        raise TypeError(f"{type(self).__name__} has no attention that AIM's adapter could use along time; use 'clip'")

    def feed(self, index: int, x: Tensor, adapter: Adapter | None, factor: Tensor | None) -> Tensor:
        """Second half of block `index`: x + mlp(n) + factor * 0.5 * adapter(n), where n is the normalised x.

        `factor` is one drop-path draw for each clip, [B].
        """
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        """[B, T, C+N, D] after the last block -> normalised features [B, D]."""
        raise NotImplementedError

    def last_norm(self) -> nn.LayerNorm:
        """The norm in `pool`. It trains even if the expert is frozen, as in CAST."""
        raise NotImplementedError

    def load(self, source: Source, trust_pickle: bool = False) -> None:
        """Take pre-trained weights.

        Raises:
            ValueError: missing keys, unknown keys, other shapes (all are listed), or an unreadable file.
        """
        raise NotImplementedError

    def frames(self, video: Tensor) -> Tensor:
        """[B, 3, frames, H, W] -> [B*T, 3, H, W]: the last frame of each tubelet, as for CAST's spatial expert."""
        size = self.config.tubelet_size
        return video[:, :, size - 1 :: size].transpose(1, 2).flatten(0, 1)


class CLIPStream(ExpertStream):
    """CLIP's image tower on single frames; CLS is the pooled token."""

    prefix = 1

    def __init__(self, config: CASTConfig, running: Running) -> None:
        super().__init__(config, running)
        self.expert: SpatialExpert = SpatialExpert(config)

    def embed(self, video: Tensor) -> Tensor:
        return self.expert.embed(self.frames(video)).unflatten(0, (video.shape[0], -1))

    def attend(self, index: int, x: Tensor, adapter: Adapter | None) -> Tensor:
        block = self.block(index)
        frames = x.flatten(0, 1).contiguous()
        return attend(frames, block.ln_1, block.attn, adapter, self.running, CLIP_NAMES[0]).view_as(x)

    def attend_over_time(self, index: int, x: Tensor, adapter: Adapter) -> Tensor:
        """Tokens of one place, including CLS, attend along time (AIM, ICLR 2023, section 3.3: no inner skip)."""
        block = self.block(index)
        places = x.transpose(1, 2)
        asked = attended(block.attn, block.ln_1(places), self.running.attention)
        return x + adapter(asked).transpose(1, 2)

    def feed(self, index: int, x: Tensor, adapter: Adapter | None, factor: Tensor | None) -> Tensor:
        block = self.block(index)
        factors = rows(factor)
        return feed_forward(x.contiguous(), block.ln_2, block.mlp, adapter, factors, self.running, CLIP_NAMES[1])

    def pool(self, x: Tensor) -> Tensor:
        return self.last_norm()(x[:, :, 0].mean(1))

    def last_norm(self) -> nn.LayerNorm:
        return self.expert.ln_post

    def load(self, source: Source, trust_pickle: bool = False) -> None:
        self.expert.load(source, trust_pickle)

    def block(self, index: int) -> CLIPBlock:
        block = self.expert.transformer.get_submodule(f"resblocks.{index}")
        _check_halves(f"resblocks.{index}", block, CLIPBlock)
        return block  # type: ignore[return-value]


class VideoMAEStream(ExpertStream):
    """VideoMAE's encoder on whole clips, all T*N tokens in one attention; the mean of the tokens is pooled."""

    prefix = 0

    def __init__(self, config: CASTConfig, running: Running) -> None:
        super().__init__(config, running)
        self.expert: TemporalExpert = TemporalExpert(config)

    def embed(self, video: Tensor) -> Tensor:
        return self.expert.embed(video).unflatten(1, (self.config.exchange_frames, self.config.num_patches))

    def attend(self, index: int, x: Tensor, adapter: Adapter | None) -> Tensor:
        block = self.block(index)
        clips = x.flatten(1, 2).contiguous()
        return attend(clips, block.norm1, block.attn, adapter, self.running, VMAE_NAMES[0]).view_as(x)

    def feed(self, index: int, x: Tensor, adapter: Adapter | None, factor: Tensor | None) -> Tensor:
        block = self.block(index)
        factors = rows(factor)
        return feed_forward(x.contiguous(), block.norm2, block.mlp, adapter, factors, self.running, VMAE_NAMES[1])

    def pool(self, x: Tensor) -> Tensor:
        return self.last_norm()(x.flatten(1, 2).mean(1))

    def last_norm(self) -> nn.LayerNorm:
        return self.expert.fc_norm

    def load(self, source: Source, trust_pickle: bool = False) -> None:
        """As `TemporalExpert.load`, but `fc_norm` keeps its initial values, as in CAST."""
        given, unknown = read_videomae(source, trust_pickle)
        given = {key: tensor for key, tensor in given.items() if not key.startswith("fc_norm.")}
        own = self.expert.state_dict()
        target = {key: tensor for key, tensor in own.items() if not key.startswith(("heads.", "fc_norm."))}
        assign(f"{type(self).__name__.removesuffix('Stream')} checkpoint", target, given, unknown)

    def block(self, index: int) -> VideoMAEBlock:
        block = self.expert.blocks[index]
        _check_halves(f"blocks.{index}", block, VideoMAEBlock)
        return block  # type: ignore[return-value]


class MVDStream(VideoMAEStream):
    """Masked Video Distillation's student (CVPR 2023): VideoMAE's encoder with its own position table.

    The table (one part for time, one for the place) is `pos_embed` in MVD's checkpoints. It is loaded and saved with
    the weights; without them it is zero.
    """

    def __init__(self, config: CASTConfig, running: Running) -> None:
        super().__init__(config, running)
        self.expert.register_buffer("pos_embed", torch.zeros_like(self.expert.pos_embed))


def _check_halves(name: str, block: nn.Module, kind: type[nn.Module]) -> None:
    """Raise TypeError if a block must be called. A stream calls only its layers, because an exchange comes between
    them.
    """
    found = plain.obstacle(name, block, plain.Reading(kind.forward))
    if found:
        raise TypeError(
            f"a stream runs the two halves of an expert's block separately and never calls the block, but {found}; "
            "replace its layers, or put the hook on them"
        )


def rows(factor: Tensor | None) -> Tensor | None:
    """[B] -> [B, 1, 1], one factor for all tokens of a clip."""
    return None if factor is None else factor[:, None, None]


__getattr__: Callable[[str], object] = renamed(__name__, {"Stream": "ExpertStream"})
