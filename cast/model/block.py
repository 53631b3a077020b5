"""`CASTBlock`: one block of each expert, their adapters, and the exchange between them."""

from __future__ import annotations

from torch import Tensor, nn

from cast.model.config import CASTConfig
from cast.model.layers import (
    CLIP_EPS,
    VMAE_EPS,
    Adapter,
    CLIPAttention,
    CLIPMlp,
    Names,
    Running,
    VideoMAEAttention,
    VideoMAEMlp,
    attend,
    drop_factor,
    feed_forward,
    init_linears,
    obstacle,
)
from cast_kernels import BCAST, attention, backends

#: The four half blocks, and the layers of each.
SPATIAL_ATTENTION = Names("clip_ln_1", "clip_attn", "S_Adapter")
TEMPORAL_ATTENTION = Names("norm1", "attn", "T_Adapter")
SPATIAL_FFN = Names("clip_ln_2", "clip_mlp", "S_MLP_Adapter")
TEMPORAL_FFN = Names("norm2", "mlp", "T_MLP_Adapter")


class CASTBlock(BCAST):
    """Self-attention, B-CAST, FFN on both streams (paper section 3.2, equations 3-5, in the published code's order).

    The class inherits from BCAST, because published checkpoints keep the exchange's tensors directly under `blocks.i.`.
    So no name needs translation.
    """

    attention: str
    expert_attention: str

    def __init__(self, config: CASTConfig, index: int, running: Running | None = None) -> None:
        running = running or Running()
        super().__init__(
            **config.exchange_sizes(),
            directions=config.directions if config.exchanges(index) else (),
            backend=running.backend,
            recompute=running.recompute,
        )
        self.attend_by(running.attention)
        dim, heads, mlp, adapter = config.embed_dim, config.num_heads, config.mlp_dim, config.adapter_dim
        self.drop_rate: float = config.drop_rate(index)
        self.drop_path_mode = config.drop_path_mode

        self.clip_ln_1: nn.LayerNorm = nn.LayerNorm(dim, eps=CLIP_EPS)
        self.clip_attn: CLIPAttention = CLIPAttention(dim, heads)
        self.S_Adapter: Adapter = Adapter(dim, adapter)
        self.clip_ln_2: nn.LayerNorm = nn.LayerNorm(dim, eps=CLIP_EPS)
        self.clip_mlp: CLIPMlp = CLIPMlp(dim, mlp)
        self.S_MLP_Adapter: Adapter = Adapter(dim, adapter)

        self.norm1: nn.LayerNorm = nn.LayerNorm(dim, eps=VMAE_EPS)
        self.attn: VideoMAEAttention = VideoMAEAttention(dim, heads)
        self.T_Adapter: Adapter = Adapter(dim, adapter)
        self.norm2: nn.LayerNorm = nn.LayerNorm(dim, eps=VMAE_EPS)
        self.mlp: VideoMAEMlp = VideoMAEMlp(dim, mlp)
        self.T_MLP_Adapter: Adapter = Adapter(dim, adapter)

        init_linears(self.clip_attn, self.S_Adapter, self.clip_mlp, self.S_MLP_Adapter)
        init_linears(self.attn, self.T_Adapter, self.mlp, self.T_MLP_Adapter)

    def forward(self, spatial: Tensor, temporal: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """spatial [B, T, 1+N, D] and temporal [B, T, N, D], contiguous -> the same."""
        spatial = self._attend_spatial(spatial)
        temporal = self._attend_temporal(temporal)
        spatial, temporal = self.exchange(spatial, temporal, self._drop_spatial(spatial), self._drop_temporal(temporal))
        return self._ffn_spatial(spatial), self._ffn_temporal(temporal)

    def _attend_spatial(self, spatial: Tensor) -> Tensor:
        """Attention within each frame. The adapter has its own skip and no drop path."""
        return attend(spatial, self.clip_ln_1, self.clip_attn, self.S_Adapter, self.running, SPATIAL_ATTENTION, (2, 1))

    def _attend_temporal(self, temporal: Tensor) -> Tensor:
        """Attention over all T*N tokens of a clip."""
        return attend(temporal, self.norm1, self.attn, self.T_Adapter, self.running, TEMPORAL_ATTENTION, (1, 2))

    def _ffn_spatial(self, spatial: Tensor) -> Tensor:
        factor = self._drop_spatial(spatial)
        if factor is not None:
            factor = factor[:, None, None] if factor.dim() == 1 else factor[:, None, :]
        adapter = self.S_MLP_Adapter
        return feed_forward(spatial, self.clip_ln_2, self.clip_mlp, adapter, factor, self.running, SPATIAL_FFN)

    def _ffn_temporal(self, temporal: Tensor) -> Tensor:
        factor = self._drop_temporal(temporal)
        if factor is not None:
            factor = factor[:, None, None]
        return feed_forward(temporal, self.norm2, self.mlp, self.T_MLP_Adapter, factor, self.running, TEMPORAL_FFN)

    def _drop_spatial(self, spatial: Tensor) -> Tensor | None:
        """A new draw for the spatial stream: [B], or [B, 1+N] with equal rows, or None if nothing is dropped."""
        if not (self.training and self.drop_rate):
            return None
        batch, _, tokens, _ = spatial.shape
        if self.drop_path_mode == "sample":
            return drop_factor((batch,), self.drop_rate, spatial)
        # The published code draws along the first dimension of a token-first layout.
        return drop_factor((tokens,), self.drop_rate, spatial).expand(batch, tokens)

    def _drop_temporal(self, temporal: Tensor) -> Tensor | None:
        """A new draw for the temporal stream: [B], or None if nothing is dropped."""
        if not (self.training and self.drop_rate):
            return None
        return drop_factor((temporal.shape[0],), self.drop_rate, temporal)

    def attend_by(self, name: str) -> None:
        """Choose the attention kernel from the next call on. The exchange takes its own equivalent of this name."""
        self.attention, self.expert_attention = attention.of_exchange(name), name

    @property
    def running(self) -> Running:
        """How the block's ops run."""
        return Running(self.backend, self.recompute, self.expert_attention)

    def obstacles(self) -> dict[str, str]:
        """Op, in words -> the layer that must be called, and why. No kernel can run such an op.

        Ops that read all weights of their layers are left out; see :mod:`cast_kernels.plain`.
        """
        halves = {
            "self-attention": (SPATIAL_ATTENTION, TEMPORAL_ATTENTION),
            "the FFN": (SPATIAL_FFN, TEMPORAL_FFN),
        }
        found = {"the exchange": self.obstacle()} if self.directions else {}
        for what, both in halves.items():
            for expert, names in zip(("spatial", "temporal"), both, strict=True):
                norm, layer, adapter = (self._modules.get(name) for name in names)
                found[f"{what} of the {expert} expert"] = obstacle(norm, layer, adapter, names)
        return {what: reason for what, reason in found.items() if reason}

    def chosen_backend(self) -> str:
        """The backend of the exchange for a batch of the parameters' dtype and device.

        "modules" if one of the exchange's layers must be called. A kernel asked for by name refuses such an exchange.
        """
        if self.backend in ("auto", "eager") and self.obstacle():
            return "modules"
        return backends.select("auto", self.problem()) if self.backend == "auto" else self.backend

    def refusal(self) -> str:
        """Why the named backend cannot run the exchange for such a batch; "" if it can, or if no backend was named."""
        if self.backend == "auto" or not self.directions:
            return ""
        verdict = backends.can_run(self.backend, self.problem())
        return "" if verdict.ok else verdict.reason

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, drop_rate={self.drop_rate:.3g}"
