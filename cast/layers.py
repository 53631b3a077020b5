"""The layers that experts and blocks share, under the parameter names of the published checkpoints."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cast_kernels import FFNParameters, SelfAttentionParameters, ffn, self_attention

#: LayerNorm epsilon of CLIP's and of VideoMAE's norms.
CLIP_EPS, VMAE_EPS = 1e-5, 1e-6


class CLIPAttention(nn.Module):
    """Parameters of CLIP's multi-head self-attention, with one packed input projection. `attend` runs it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight [3D, D] and bias of queries, keys, values in this order, then of the output projection."""
        return self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias


class VideoMAEAttention(nn.Module):
    """Parameters of VideoMAE's multi-head self-attention; queries and values have a bias. `attend` runs it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight [3D, D] and bias of queries, keys, values in this order, then of the output projection."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return self.qkv.weight, bias, self.proj.weight, self.proj.bias


class CLIPMlp(nn.Module):
    """Parameters of CLIP's FFN with QuickGELU, x * sigmoid(1.702 x). `feed_forward` runs it."""

    activation = "quick_gelu"

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, hidden)
        self.c_proj = nn.Linear(hidden, dim)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the first and of the second layer."""
        return self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias


class VideoMAEMlp(nn.Module):
    """Parameters of VideoMAE's FFN with exact GELU. `feed_forward` runs it."""

    activation = "gelu"

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the first and of the second layer."""
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias


class Adapter(nn.Module):
    """Down, exact GELU, up, without a skip; the up-projection starts at zero (paper section 3.2)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.D_fc1 = nn.Linear(dim, hidden)
        self.D_fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.D_fc2(F.gelu(self.D_fc1(x)))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the down- and of the up-projection."""
        return self.D_fc1.weight, self.D_fc1.bias, self.D_fc2.weight, self.D_fc2.bias


class Running(NamedTuple):
    """How ops run: which backend, what backward computes again (see `cast_kernels.bcast`), and what attends.

    See `cast_kernels.attention` for the last.
    """

    backend: str = "auto"
    recompute: str = "cheap"
    attention: str = "auto"


def attend(
    x: Tensor,
    norm: nn.LayerNorm,
    attention: CLIPAttention | VideoMAEAttention,
    adapter: Adapter | None,
    running: Running,
) -> Tensor:
    """x + a + adapter(a) with a = attention(norm(x)): [batch, tokens, D] -> the same (paper equation 3)."""
    tensors = () if adapter is None else adapter.tensors()
    parameters = SelfAttentionParameters(norm.weight, norm.bias, *attention.tensors(), *tensors)
    return self_attention(x, parameters, num_heads=attention.num_heads, eps=norm.eps, **running._asdict())


def feed_forward(
    x: Tensor,
    norm: nn.LayerNorm,
    mlp: CLIPMlp | VideoMAEMlp,
    adapter: Adapter | None,
    row_scale: Tensor | None,
    running: Running,
) -> Tensor:
    """x + mlp(n) + row_scale * 0.5 * adapter(n) with n = norm(x): [..., D] -> the same (paper equations 4 and 5).

    The published code halves the adapters beside the FFN. `row_scale` is a drop-path draw, broadcastable to [...].
    """
    tensors = () if adapter is None else adapter.tensors()
    parameters = FFNParameters(norm.weight, norm.bias, *mlp.tensors(), *tensors)
    return ffn(
        x, parameters, activation=mlp.activation, eps=norm.eps, adapter_scale=0.5, row_scale=row_scale,
        recompute=running.recompute, backend=running.backend,
    )  # fmt: skip


class TubeletEmbedding(nn.Module):
    """VideoMAE's patch embedding: [B, 3, frames, H, W] -> [B, T*N, D], tokens ordered by time, row, column."""

    def __init__(self, dim: int, tubelet: int, patch: int) -> None:
        super().__init__()
        size = (tubelet, patch, patch)
        self.proj = nn.Conv3d(3, dim, kernel_size=size, stride=size)

    def forward(self, video: Tensor) -> Tensor:
        # Contiguous once here: every residual after it would keep the convolution's channel-first strides.
        return self.proj(video).flatten(2).transpose(1, 2).contiguous()


def embed_frames(frames: Tensor, conv: nn.Conv2d, cls: Tensor, positions: Tensor, norm: nn.LayerNorm) -> Tensor:
    """CLIP's embedding: [frames, 3, H, W] -> [frames, 1+N, D], CLS first, patches row-major, normalised."""
    patches = conv(frames).flatten(2).transpose(1, 2)
    cls = cls.to(patches.dtype).expand(frames.shape[0], 1, -1)
    return norm(torch.cat((cls, patches), dim=1) + positions)


def sincos_table(length: int, dim: int, device: torch.device | str | None = None) -> Tensor:
    """[1, length, dim] fp32: VideoMAE's fixed positions, computed in fp64 and rounded once.

    Channel j of position p is sin (even j) or cos (odd j) of p / 10000^(2 * floor(j / 2) / dim).
    """
    position = torch.arange(length, dtype=torch.float64, device=device)[:, None]
    channel = torch.arange(dim, dtype=torch.float64, device=device)
    angle = position / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


def init_linears(*modules: nn.Module) -> None:
    """Every Linear in them: normal with std 0.02, bias 0; adapters' up-projections: 0.

    The published code truncates at +-2, which is a hundred deviations away: the same values, drawn in half the time.
    """
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, Adapter):
            nn.init.zeros_(layer.D_fc2.weight)
            nn.init.zeros_(layer.D_fc2.bias)


def drop_factor(shape: tuple[int, ...], rate: float, like: Tensor) -> Tensor:
    """One drop-path draw: 0 with probability `rate`, else 1 / (1 - rate), in the dtype and on the device of `like`."""
    keep = 1 - rate
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(keep).div_(keep)
