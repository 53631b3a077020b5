"""B-CAST without our kernels, with the published code's order of operators and layouts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import cast_kernels


def to_published_layout(spatial: Tensor, temporal: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T, 1+N, D], [B, T, N, D] -> (1+N, B·T, D), (B, T·N, D), contiguous: the published code's layouts."""
    return spatial.flatten(0, 1).transpose(0, 1).contiguous(), temporal.flatten(1, 2).contiguous()


def from_published_layout(spatial: Tensor, temporal: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`to_published_layout` (views)."""
    return spatial.transpose(0, 1).unflatten(0, (-1, frames)), temporal.unflatten(1, (frames, -1))


def published(module: cast_kernels.BCAST, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """B-CAST in the published code's order of operators, for time and space windows.

    This includes its copies between layouts, its stored scores, q scaled after its bias and the concatenation of CLS.

    Args:
        module: has the parameters.
        s: (1+N, B·T, D), token first.
        t: (B, T·N, D).
    """
    p = module.gathered()
    assert p.t2s is not None
    assert p.s2t is not None
    frames, heads = module.num_frames, module.num_heads
    batch = t.shape[0]
    width = (module.bottleneck_dim,)
    n_s = F.linear(s, p.spatial.down_weight, p.spatial.down_bias)
    n_s = F.layer_norm(n_s, width, p.spatial.norm_weight, p.spatial.norm_bias, 1e-6)
    n_t = F.linear(t, p.temporal.down_weight, p.temporal.down_bias)
    n_t = F.layer_norm(n_t, width, p.temporal.norm_weight, p.temporal.norm_bias, 1e-6)

    cls, patches = n_s[:1], n_s[1:]
    asking = patches.unflatten(1, (batch, frames)).permute(1, 0, 2, 3).flatten(0, 1)  # (B·N, T, d)
    answering = n_t.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)
    mixed = _attend(asking, answering, p.t2s, heads)
    mixed = mixed.unflatten(0, (batch, -1)).permute(1, 0, 2, 3).flatten(1, 2)  # (N, B·T, d)
    branch_s = F.linear(F.gelu(torch.cat([cls, mixed])), p.spatial.up_weight, p.spatial.up_bias)

    asking = n_t.unflatten(1, (frames, -1)).flatten(0, 1)  # (B·T, N, d)
    answering = patches.transpose(0, 1)
    mixed = _attend(asking, answering, p.s2t, heads).unflatten(0, (batch, frames)).flatten(1, 2)
    branch_t = F.linear(F.gelu(mixed), p.temporal.up_weight, p.temporal.up_bias)
    return s + branch_s, t + branch_t


def _attend(x: Tensor, y: Tensor, p: cast_kernels.Direction, heads: int) -> Tensor:
    windows, length, width = x.shape
    assert p.q_pos is not None
    assert p.kv_pos is not None
    x, y = x + p.q_pos, y + p.kv_pos
    q = F.linear(x, p.q_weight, p.q_bias).reshape(windows, length, heads, -1).permute(0, 2, 1, 3)
    kv = F.linear(y, p.kv_weight, p.kv_bias).reshape(windows, length, 2, heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q * (width // heads) ** -0.5) @ kv[0].transpose(-2, -1)
    mixed = (scores.softmax(dim=-1) @ kv[1]).transpose(1, 2).reshape(windows, length, width)
    return F.linear(mixed, p.proj_weight, p.proj_bias)


class OneDNNLinears(TorchFunctionMode):
    """While active, every linear layer runs in oneDNN instead of the BLAS that PyTorch chooses. Forward only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3]
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
