"""`VideoMAE`: a masked autoencoder with a temporal expert as encoder, under the official names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cast.model.config import CASTConfig, make_config
from cast.model.experts import VideoMAEBlock, check_shape
from cast.model.layers import VMAE_EPS, Running, TubeletEmbedding
from cast.model.positions import FixedPositions
from cast.model.weights.assign import check
from cast.pretrain.masking import Mask, gather, hidden_patches, pixels, statistics, tube_mask, tubelets
from cast.pretrain.settings import DecoderSettings
from cast_kernels import attention as attentions
from cast_kernels import plain


class Reconstruction(NamedTuple):
    """The decoder's output for hidden tokens, and its target: [B, K, tubelet * patch * patch * 3]."""

    prediction: Tensor
    target: Tensor

    def loss(self) -> Tensor:
        """Mean squared error, in fp32 (paper equation 3)."""
        return F.mse_loss(self.prediction.float(), self.target.float())


class _Encoder(FixedPositions):
    """VideoMAE's encoder of the visible tokens."""

    config: CASTConfig

    def __init__(self, config: CASTConfig, running: Running) -> None:
        super().__init__()
        self.config, dim = config, config.embed_dim
        self.patch_embed: TubeletEmbedding = TubeletEmbedding(dim, config.tubelet_size, config.patch_size)
        self.place_tokens(config.exchange_frames * config.num_patches, dim)
        self.blocks: nn.ModuleList = nn.ModuleList(VideoMAEBlock(config, running) for _ in range(config.depth))
        self.norm: nn.LayerNorm = nn.LayerNorm(dim, eps=VMAE_EPS)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Pixels [B, T*N, tubelet * patch * patch, 3] and the numbers [B, K] of the visible tokens -> [B, K, D]."""
        x = self._embed(gather(tokens, visible))
        x = x + gather(self.pos_embed.expand(len(x), -1, -1), visible)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _embed(self, seen: Tensor) -> Tensor:
        """Pixels [B, K, tubelet * patch * patch, 3] -> [B, K, D].

        The published embedding is a convolution over all tokens; nine tenths of its results would not be used.
        """
        if plain.global_obstacle() or plain.obstacle("patch_embed", self.patch_embed):
            # A layer that must be called gets each token as a separate video.
            size = (self.config.tubelet_size, self.config.patch_size, self.config.patch_size)
            videos = seen.flatten(0, 1).transpose(1, 2).unflatten(2, size)
            return self.patch_embed(videos).view(*seen.shape[:2], -1)
        conv = self.patch_embed.proj
        return F.linear(seen.flatten(2), conv.weight.permute(0, 2, 3, 4, 1).flatten(1), conv.bias)


class _Decoder(nn.Module):
    """A narrow transformer over all tokens, the hidden ones last. Its output is for the hidden ones."""

    def __init__(self, config: CASTConfig, out: int, running: Running) -> None:
        super().__init__()
        self.blocks: nn.ModuleList = nn.ModuleList(VideoMAEBlock(config, running) for _ in range(config.depth))
        self.norm: nn.LayerNorm = nn.LayerNorm(config.embed_dim, eps=VMAE_EPS)
        self.head: nn.Linear = nn.Linear(config.embed_dim, out)

    def forward(self, x: Tensor, hidden: int) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -hidden:]))


class VideoMAE(FixedPositions):
    """Masked autoencoder of videos (arXiv 2203.12602), with the official pre-training code's names.

    :meth:`save` writes a VideoMAE checkpoint. `CAST.load_experts(videomae=...)`, `TemporalExpert.load` and readers of
    the official checkpoints read it.

    Args:
        variant: a name in `cast.VARIANTS`, or a CASTConfig; only the experts' sizes are read.
        decoder: sizes of the decoder; by default half the encoder's width and heads, as published for ViT-S, B and L.
        mask_ratio: hidden share of the patches, the same patches in all frames.
        normalised: whether a patch's target has mean 0 and deviation 1 in each channel (the published choice).
        fused: whether blocks may run in compiled kernels; if not, they run in eager PyTorch.
        attention: the attention kernel, as in :class:`cast.CAST`.

    Raises:
        ValueError: a ratio that hides nothing or everything, or impossible sizes of the decoder.
    """

    config: CASTConfig
    mask_ratio: float
    normalised: bool

    def __init__(
        self,
        variant: str | CASTConfig = "base",
        decoder: DecoderSettings | None = None,
        mask_ratio: float = 0.9,
        normalised: bool = True,
        fused: bool = True,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.config = config = make_config(variant)
        self.decoder_settings: DecoderSettings = decoder or DecoderSettings()
        self.mask_ratio, self.normalised = mask_ratio, normalised
        hidden_patches(config.num_patches, mask_ratio)
        running = Running("auto" if fused else "eager", attention=attentions.check_name(attention))
        narrow = self.decoder_settings.config(config)
        self.encoder: _Encoder = _Encoder(config, running)
        self.encoder_to_decoder: nn.Linear = nn.Linear(config.embed_dim, narrow.embed_dim, bias=False)
        self.mask_token: nn.Parameter = nn.Parameter(torch.zeros(1, 1, narrow.embed_dim))
        self.decoder: _Decoder = _Decoder(narrow, 3 * config.tubelet_size * config.patch_size**2, running)
        self.place_tokens(config.exchange_frames * config.num_patches, narrow.embed_dim)
        self._initialise()

    def _initialise(self) -> None:
        """Glorot's initialisation of matrices and a deviation of 0.02 for the mask token, as in the official code.

        The patch embedding and the layer between encoder and decoder keep PyTorch's defaults, as in that code.
        """
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def draw(self, clips: int, device: torch.device | str = "cpu") -> Mask:
        """A mask for `clips` clips, from PyTorch's generator of the CPU."""
        config = self.config
        return tube_mask(clips, config.exchange_frames, config.num_patches, self.mask_ratio, device)

    def forward(self, video: Tensor, mask: Mask | None = None) -> Reconstruction:
        """Hide most of a video and reconstruct it.

        Args:
            video: [B, 3, frames, H, W], floating-point, normalised with ImageNet's mean and deviation.
            mask: the tokens to hide; drawn if None.

        Returns:
            The hidden tokens, in the order of `mask.hidden`; pixels (time, row, column) times colours within each.

        Raises:
            ValueError, TypeError: another shape, or integer pixels.
        """
        config = self.config
        check_shape("clips", video, (3, config.num_frames, config.image_size, config.image_size))
        mask = self.draw(len(video), video.device) if mask is None else mask
        tokens = tubelets(video, config.tubelet_size, config.patch_size)
        seen = self.encoder_to_decoder(self.encoder(tokens, mask.visible))
        places = self.pos_embed.expand(len(video), -1, -1)
        hidden = self.mask_token + gather(places, mask.hidden)
        x = torch.cat((seen + gather(places, mask.visible), hidden.to(seen.dtype)), dim=1)
        prediction = self.decoder(x, mask.hidden.shape[1])
        return Reconstruction(prediction, self.target(gather(tokens, mask.hidden)))

    @torch.no_grad()
    def target(self, tokens: Tensor) -> Tensor:
        """The targets of input tokens [B, K, tubelet * patch * patch, 3], flattened to [B, K, all of it]."""
        tokens = pixels(tokens.float())
        if self.normalised:
            mean, deviation = statistics(tokens)
            tokens = (tokens - mean) / deviation
        return tokens.flatten(2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write encoder and decoder into one safetensors file; its header has the settings for :meth:`read`."""
        about = {
            "config": self.config.to_dict(),
            "decoder": vars(self.decoder_settings),
            "mask_ratio": self.mask_ratio,
            "normalised": self.normalised,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        part = Path(f"{os.fspath(path)}.part")
        save_file(tensors, part, metadata={"format": "pt", "videomae": json.dumps(about)})
        os.replace(part, path)

    @classmethod
    def read(cls, path: str | os.PathLike[str], fused: bool = True) -> VideoMAE:
        """The model that :meth:`save` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that :meth:`save` did not write, or a damaged one.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file; cast pretrain writes one")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["videomae"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not written by cast pretrain, or damaged ({error})") from None
        decoder = DecoderSettings(**about["decoder"])
        model = cls(CASTConfig(**about["config"]), decoder, about["mask_ratio"], about["normalised"], fused)
        check(str(path), model.state_dict(), tensors)
        model.load_state_dict(tensors)
        return model.eval()
