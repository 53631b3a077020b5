"""`CAST`: two frozen experts, adapters, and an exchange in every block."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cast.ground.sampling import Sampling
from cast.model.block import CASTBlock
from cast.model.config import CASTConfig, make_config
from cast.model.experts import check_shape
from cast.model.heads import apply_heads, build_heads
from cast.model.hub import Shared
from cast.model.layers import CLIP_EPS, VMAE_EPS, Running, TubeletEmbedding, embed_frames
from cast.model.positions import FixedPositions
from cast.model.weights.assign import assign, check
from cast.model.weights.clip import fit_positions, read_clip
from cast.model.weights.official import infer_config, read_official
from cast.model.weights.source import Source
from cast.model.weights.videomae import read_videomae
from cast_kernels import Recompute, backends, plain
from cast_kernels import attention as attentions

#: Allowed words for the dtype of the residual streams.
STREAM_DTYPES = ("auto", "autocast")

#: Parameters that train: exchange, adapters, final norms, heads. The experts stay frozen (paper section 3).
TRAINABLE = re.compile(r"cross|Adapter|^clip_ln_post\.|^vmae_fc_norm\.|^head")


class CAST(FixedPositions, Shared):
    """Cross-Attention in Space and Time (arXiv 2311.18825), with the published code's semantics and names.

    `state_dict()` has the official layout, so published checkpoints load by name. Only adapters, exchange,
    final norms and heads require gradients.

    Args:
        variant: a name in `cast.VARIANTS`, or a CASTConfig.
        heads: name -> classes: one head under any name ({"action": 400} if None), or {"verb": 97, "noun": 300}.
        fused: whether exchange, attention and FFNs may run in compiled kernels; if not, they run in eager PyTorch.
            Either way a layer that was replaced or has a hook is called (docs/model.md).
        recompute: the intermediate values that backward of fused ops computes again instead of keeping: `nothing`,
            `cheap` or `all`, see :class:`cast_kernels.Recompute`. `auto` decides by shapes and by
            the whole memory of the device (:mod:`cast_kernels.recompute`).
        attention: the attention kernel of the experts on a GPU: `auto` (PyTorch's scaled_dot_product_attention),
            `sdpa`, `flash-attn` or `xformers`. `cast_kernels.attention.explain` says which can run, and why. `math` is
            for experts and exchange: with `fused=False` the model can be differentiated twice, and in forward mode.
        stream_dtype: dtype of the residual streams between the blocks. `auto`: the result of PyTorch's operators, which
            is float32 under autocast with float32 parameters. `autocast`: autocast's dtype while autocast is on, else
            as `auto`. That is fewer bytes and one rounding after each half block (docs/model.md gives the cost). May be
            set at any time.
        backend: a name in `cast_kernels.backends.BACKENDS`, which must then run, see `fuse`. `auto` takes the fastest
            that can.
        overrides: fields of CASTConfig.

    Raises:
        TypeError: an override that CASTConfig does not have.
        ValueError: an unknown variant, or a value that no model can have; a backend of a model that is not fused.
    """

    config: CASTConfig

    def __init__(
        self,
        variant: str | CASTConfig = "base",
        heads: Mapping[str, int] | None = None,
        fused: bool = True,
        recompute: Recompute | str = "auto",
        attention: str = "auto",
        stream_dtype: str = "auto",
        backend: str = "auto",
        **overrides: Any,
    ) -> None:
        super().__init__()
        if backends.check_name(backend) != "auto" and not fused:
            raise ValueError(f"fused=False runs in eager PyTorch, and backend is {backend!r}; leave one out")
        self.config = config = make_config(variant, heads, **overrides)
        self.stream_dtype = stream_dtype
        #: Class names by head, or None if unknown; save_pretrained writes them.
        self.labels: dict[str, list[str]] | None = None
        #: How the training sampled frames, or None if unknown. Tests sample in the same way; save_pretrained writes it.
        self.sampling: Sampling | None = None
        #: Training shrank larger pictures to so many pixels first; None if it did not. Used and written like
        #: `sampling`.
        self.short_side: int | None = None
        dim = config.embed_dim
        self.clip_class_embedding: nn.Parameter = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.clip_positional_embedding: nn.Parameter = nn.Parameter(
            torch.randn(1 + config.num_patches, dim) * dim**-0.5
        )
        self.patch_embed: TubeletEmbedding = TubeletEmbedding(dim, config.tubelet_size, config.patch_size)
        self.clip_conv1: nn.Conv2d = nn.Conv2d(3, dim, config.patch_size, config.patch_size, bias=False)
        self.clip_ln_pre: nn.LayerNorm = nn.LayerNorm(dim, eps=CLIP_EPS)
        running = Running(backend if fused else "eager", recompute, attention)
        self.blocks: nn.ModuleList = nn.ModuleList(CASTBlock(config, index, running) for index in range(config.depth))
        self.clip_ln_post: nn.LayerNorm = nn.LayerNorm(dim, eps=CLIP_EPS)
        self.vmae_fc_norm: nn.LayerNorm = nn.LayerNorm(dim, eps=VMAE_EPS)
        for name, module in build_heads(config).items():
            self.add_module(name, module)
        self.place_tokens(config.exchange_frames * config.num_patches, dim)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(TRAINABLE.search(name) is not None)

    @property
    def stream_dtype(self) -> str:
        """The dtype of the residual streams, a word of `STREAM_DTYPES`; see the constructor.

        Raises:
            ValueError: another word.
        """
        return self._stream_dtype

    @stream_dtype.setter
    def stream_dtype(self, name: str) -> None:
        if name not in STREAM_DTYPES:
            raise ValueError(f"stream_dtype is {name!r}; allowed: {', '.join(map(repr, STREAM_DTYPES))}")
        self._stream_dtype = name

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
        """Video -> pooled and normalised (spatial, temporal) features, [B, D] each: the heads' input."""
        spatial, temporal = self.tokens(video)
        # Both norms follow the mean. Under autocast the mean stays in float32, though a stream may have 16 bits.
        kind = torch.promote_types(spatial.dtype, self.clip_class_embedding.dtype)
        means = spatial[:, :, 0].mean(1, dtype=kind), temporal.flatten(1, 2).mean(1, dtype=kind)
        return self.clip_ln_post(means[0]), self.vmae_fc_norm(means[1])

    def tokens(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video -> spatial [B, T, 1+N, D] and temporal [B, T, N, D] after the last block."""
        spatial, temporal = self.embed(video)
        for block in self.blocks:
            spatial, temporal = block(spatial, temporal)
        return spatial, temporal

    def embed(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video -> spatial [B, T, 1+N, D] and temporal [B, T, N, D] before the first block."""
        config = self.config
        check_shape("videos", video, (3, config.num_frames, config.image_size, config.image_size))
        if video.device.type != "cpu" or not self._is_fused():
            return self._as_streams(*self._embed(video))
        # On a processor without bfloat16 instructions PyTorch's convolutions take 1.9 s a clip in bfloat16, 0.05 s in
        # float32.
        with torch.autocast("cpu", enabled=False):
            streams = self._embed(video.to(self.clip_class_embedding.dtype))
        return self._as_streams(*streams)

    def _as_streams(self, spatial: Tensor, temporal: Tensor) -> tuple[Tensor, Tensor]:
        """The streams in the dtype that `stream_dtype` asks for; every block keeps it."""
        device = spatial.device.type
        if self.stream_dtype == "auto" or not torch.is_autocast_enabled(device):
            return spatial, temporal
        kind = torch.get_autocast_dtype(device)
        return spatial.to(kind), temporal.to(kind)

    def _is_fused(self) -> bool:
        return any(block.backend != "eager" for _, block in self.cast_blocks())

    def cast_blocks(self) -> Iterator[tuple[str, CASTBlock]]:
        """The blocks by their names in the model, wrapped blocks included."""
        for index, child in enumerate(self.blocks):
            for name, module in [("", child)] if isinstance(child, CASTBlock) else child.named_modules():
                if isinstance(module, CASTBlock):
                    yield f"blocks.{index}{name and '.'}{name}", module

    def _embed(self, video: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        # The last frame of each tubelet: the 2nd, 4th, ... of 16 (the paper's "even" frames).
        frames = video[:, :, config.tubelet_size - 1 :: config.tubelet_size].transpose(1, 2).flatten(0, 1)
        spatial = embed_frames(
            frames, self.clip_conv1, self.clip_class_embedding, self.clip_positional_embedding, self.clip_ln_pre
        )
        temporal = self.patch_embed(video) + self.pos_embed
        grid = (config.exchange_frames, config.num_patches)
        return spatial.unflatten(0, (video.shape[0], grid[0])), temporal.unflatten(1, grid)

    def fuse(self, backend: str = "auto", attention: str | None = None) -> CAST:
        """Let all ops run in the fastest backend that can, or in the named one, from the next call on.

        Args:
            backend: "auto", or the one that must run.
            attention: the attention kernel, as in the constructor; None keeps the present one.

        Raises:
            ValueError: no such backend or attention.
        """
        backends.check_name(backend)
        if attention is not None:
            attentions.check_name(attention)
        for _, block in self.cast_blocks():
            block.backend = backend
            if attention is not None:
                block.attend_by(attention)
        return self

    def unfuse(self, attention: str | None = None) -> CAST:
        """Let all ops run in eager PyTorch from the next call on: the same mathematics; `attention` as in `fuse`."""
        return self.fuse("eager", attention)

    def explain(self) -> str:
        """Print and return the exchange's backend, and which ops call a layer instead of reading its weights, and why.

        If a named backend cannot run the exchange with the parameters' dtype, without autocast, the text says why. An
        op with such a layer runs by its modules in PyTorch, or is refused if a kernel was asked for by name: see
        :mod:`cast_kernels.plain` and docs/model.md. `cast_kernels.explain` says which backends can run one exchange.
        """
        lines = [self.extra_repr()]
        for name, block in self.cast_blocks():
            for what, found in block.obstacles().items():
                lines.append(f"{name}: {plain.verdict(what, block.backend, found)}")
        if len(lines) == 1:
            lines.append("every op reads the weights of its layers; none has to be called")
        refused = {(block.backend, block.refusal()) for _, block in self.cast_blocks()}
        lines += [f"backend={name!r} cannot run the exchange: {reason}" for name, reason in sorted(refused) if reason]
        text = "\n".join(lines)
        print(text)
        return text

    def load_experts(
        self, clip: Source | None = None, videomae: Source | None = None, trust_pickle: bool = False
    ) -> CAST:
        """Put pre-trained experts into the blocks. Adapters, exchange, `vmae_fc_norm` and heads stay as they are.

        Args:
            clip: CLIP's image tower: OpenAI's TorchScript archive, or open_clip, timm, transformers or
                SpatialExpert layout. QuickGELU is assumed, as OpenAI trained it. Positions of another image size are
                interpolated.
            videomae: VideoMAE: official layout (pre-trained or fine-tuned), MMAction2, transformers or TemporalExpert.
            trust_pickle: whether a torch file may run code while it loads; never needed for TorchScript archives.

        Raises:
            ValueError: missing keys, unknown keys, other shapes (all are listed), or an unreadable file.
            FileNotFoundError, TypeError: no such file, or a source of another kind.
        """
        own = self.state_dict()
        loads: list[tuple[str, dict[str, Tensor], dict[str, Tensor], list[str]]] = []
        if clip is not None:
            given, unknown = read_clip(clip, trust_pickle)
            given = fit_positions(given, len(self.clip_positional_embedding))
            target = {theirs: own[ours] for theirs, ours in _clip_keys(own).items()}
            loads.append(("CLIP checkpoint", target, given, unknown))
        if videomae is not None:
            given, unknown = read_videomae(videomae, trust_pickle)
            # CAST pools with its own norm, trained from scratch. The published code drops VideoMAE's norm too.
            given = {key: tensor for key, tensor in given.items() if not key.startswith("fc_norm.")}
            target = {key: tensor for key, tensor in own.items() if _VIDEOMAE.match(key)}
            loads.append(("VideoMAE checkpoint", target, given, unknown))
        for load in loads:  # check both before either changes the model
            check(*load)
        for load in loads:
            assign(*load)
        return self

    @classmethod
    def _holding(cls, what: str, config: CASTConfig, tensors: Mapping[str, Tensor], fused: bool) -> CAST:
        """A model made of these tensors, without initialising weights that would be overwritten."""
        with torch.device("meta"):
            model = cls(config, fused=fused)
        check(what, model.state_dict(), tensors)
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def extra_repr(self) -> str:
        """The configuration in a line, and where the exchange runs."""
        runs = {block.chosen_backend() for _, block in self.cast_blocks() if block.directions}
        return f"heads={self.config.classes}, exchange runs on: {', '.join(sorted(runs)) or 'nothing, there is none'}"


def load_official_checkpoint(
    source: Source, num_heads: int | None = None, fused: bool = True, trust_pickle: bool = False
) -> CAST:
    """A published CAST checkpoint as a working fp32 model, in evaluation mode.

    Sizes, heads, windows and layers with exchange are read off the tensors' shapes and names.

    Args:
        source: path or state dict in the official layout: plain, under 'model' or 'module' (DeepSpeed), with or
            without prefixes.
        num_heads: attention heads, which leave no trace in any shape; D / 64 if None.
        fused: whether the exchange may run in a compiled kernel.
        trust_pickle: whether a torch file may run code while it loads.

    Raises:
        ValueError: not the official layout, missing keys, unknown keys, other shapes (all are listed).
        FileNotFoundError, TypeError: no such file, or a source of another kind.
    """
    tensors = read_official(source, trust_pickle)
    config = infer_config(tensors, num_heads)
    # A copy, so that training the model does not change the caller's tensors.
    own = {key: tensor.to(torch.float32, copy=True) for key, tensor in tensors.items()}
    return CAST._holding("CAST checkpoint", config, own, fused)


#: VideoMAE's part of CAST's state dict, under the same names.
_VIDEOMAE = re.compile(r"patch_embed\.|blocks\.\d+\.(norm1|norm2|attn|mlp)\.")
_CLIP = re.compile(r"(?:blocks\.(\d+)\.)?clip_(.+)")


def _clip_keys(own: Mapping[str, Tensor]) -> dict[str, str]:
    """OpenAI's name -> CAST's name, for CLIP's part of CAST's state dict."""
    names = {}
    for key in own:
        if match := _CLIP.fullmatch(key):
            layer, rest = match.groups()
            names[rest if layer is None else f"transformer.resblocks.{layer}.{rest}"] = key
    return names
