"""The mathematics of every op in plain PyTorch: the definition of correct for every backend.

Written for reading, not for speed: each line is one term of the paper's section 3.3, scores are materialised, and any
floating dtype works (fp64 for comparisons; passes gradcheck). It imports nothing of ours, so that no backend can share
a mistake with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def bcast(
    spatial: Tensor,
    temporal: Tensor,
    parameters: Any,
    *,
    num_heads: int,
    windows: tuple[str, str] = ("time", "space"),
    eps: float = 1e-6,
    spatial_scale: Tensor | None = None,
    temporal_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """B-CAST (paper section 3.3, equations 6-8, with the released code's LayerNorm, biases and CLS rule).

    Args:
        spatial: [B, T, 1+N, D]; token 0 of each frame is CLS.
        temporal: [B, T, N, D].
        parameters: the fields of :class:`cast_kernels.problem.Parameters`.
        num_heads: heads of the cross-attention; divides d.
        windows: shapes of the t2s and the s2t window.
        eps: LayerNorm epsilon.
        spatial_scale: [B, 1+N] or [B], multiplies the spatial branch before the residual sum.
        temporal_scale: [B], the same for the temporal branch.

    Returns:
        Both streams with the exchange added; a stream that receives nothing is returned as it came.
    """
    # Both directions read the features before the exchange: T2S and S2T run in parallel, not in sequence.
    u_s = _down(spatial, parameters.spatial, eps)
    u_t = _down(temporal, parameters.temporal, eps)
    cls, patches = u_s[:, :, :1], u_s[:, :, 1:]
    spatial_out, temporal_out = spatial, temporal
    if parameters.t2s is not None:
        asked = _cross_attention(patches, u_t, parameters.t2s, num_heads, windows[0])
        # CLS is neither query nor key and skips the projection; GELU and up see it.
        branch = _up(torch.cat([cls, asked], dim=2), parameters.spatial)
        if spatial_scale is not None:
            branch = branch * spatial_scale.reshape(spatial.shape[0], 1, -1, 1)
        spatial_out = spatial + branch
    if parameters.s2t is not None:
        asked = _cross_attention(u_t, patches, parameters.s2t, num_heads, windows[1])
        branch = _up(asked, parameters.temporal)
        if temporal_scale is not None:
            branch = branch * temporal_scale.reshape(-1, 1, 1, 1)
        temporal_out = temporal + branch
    return spatial_out, temporal_out


def _down(x: Tensor, p: Any, eps: float) -> Tensor:
    """LayerNorm after the down-projection (equation 8, left to right)."""
    return F.layer_norm(F.linear(x, p.down_weight, p.down_bias), p.norm_weight.shape, p.norm_weight, p.norm_bias, eps)


def _up(x: Tensor, p: Any) -> Tensor:
    return F.linear(F.gelu(x), p.up_weight, p.up_bias)


def group(x: Tensor, window: str) -> Tensor:
    """[B, T, N, d] -> [groups, W, d]: the tokens that attend together, in order of their position."""
    batch, frames, patches, dim = x.shape
    if window == "time":
        return x.transpose(1, 2).reshape(batch * patches, frames, dim)
    if window == "space":
        return x.reshape(batch * frames, patches, dim)
    return x.reshape(batch, frames * patches, dim)


def ungroup(x: Tensor, window: str, batch: int, frames: int, patches: int) -> Tensor:
    """The inverse of :func:`group`."""
    if window == "time":
        return x.reshape(batch, patches, frames, x.shape[-1]).transpose(1, 2)
    return x.reshape(batch, frames, patches, x.shape[-1])


def _cross_attention(asking: Tensor, answering: Tensor, p: Any, num_heads: int, window: str) -> Tensor:
    """Multi-head cross-attention inside windows, positions on queries, keys and values (equations 6, 7)."""
    batch, frames, patches, dim = asking.shape
    x, y = group(asking, window), group(answering, window)
    if p.q_pos is not None:
        x = x + p.q_pos
    if p.kv_pos is not None:
        y = y + p.kv_pos
    head_dim = dim // num_heads
    q = F.linear(x, p.q_weight, p.q_bias)
    k, v = F.linear(y, p.kv_weight, p.kv_bias).split(dim, dim=-1)
    q, k, v = (z.unflatten(-1, (num_heads, head_dim)).transpose(1, 2) for z in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-2, -1) * head_dim**-0.5, dim=-1)
    mixed = (weights @ v).transpose(1, 2).flatten(-2)
    return ungroup(F.linear(mixed, p.proj_weight, p.proj_bias), window, batch, frames, patches)


def ffn(
    x: Tensor,
    parameters: Any,
    *,
    activation: str = "gelu",
    eps: float,
    adapter_scale: float = 0.5,
    row_scale: Tensor | None = None,
) -> Tensor:
    """The second half of an expert's block: FFN and adapter side by side (paper section 3.2, equations 4 and 5).

    Args:
        x: [..., D].
        parameters: the fields of :class:`cast_kernels.problem.FFNParameters`.
        activation: "gelu" (erf) or "quick_gelu", x * sigmoid(1.702 x).
        eps: LayerNorm epsilon.
        adapter_scale: factor of the adapter's branch.
        row_scale: broadcastable to x.shape[:-1], multiplies the adapter's branch.

    Returns:
        x + FFN(LN(x)) + row_scale * adapter_scale * Adapter(LN(x)), [..., D].
    """
    p = parameters
    normed = F.layer_norm(x, p.norm_weight.shape, p.norm_weight, p.norm_bias, eps)
    hidden = F.linear(normed, p.fc1_weight, p.fc1_bias)
    hidden = F.gelu(hidden) if activation == "gelu" else hidden * torch.sigmoid(1.702 * hidden)
    y = x + F.linear(hidden, p.fc2_weight, p.fc2_bias)
    if p.down_weight is not None:
        branch = F.linear(F.gelu(F.linear(normed, p.down_weight, p.down_bias)), p.up_weight, p.up_bias)
        y = y + adapter_scale * branch * (1.0 if row_scale is None else row_scale.expand(x.shape[:-1]).unsqueeze(-1))
    return y


def self_attention(x: Tensor, parameters: Any, *, num_heads: int, eps: float) -> Tensor:
    """The first half of an expert's block: attention, then its adapter in series (paper section 3.2, equation 3).

    Args:
        x: [batch, tokens, D]; the tokens of a batch entry attend together.
        parameters: the fields of :class:`cast_kernels.problem.SelfAttentionParameters`.
        num_heads: heads; divides D.
        eps: LayerNorm epsilon.

    Returns:
        x + a + Adapter(a) with a = Attention(LN(x)), [batch, tokens, D].
    """
    p = parameters
    normed = F.layer_norm(x, p.norm_weight.shape, p.norm_weight, p.norm_bias, eps)
    qkv = F.linear(normed, p.qkv_weight, p.qkv_bias)
    q, k, v = (z.unflatten(-1, (num_heads, -1)).transpose(1, 2) for z in qkv.chunk(3, dim=-1))
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    a = F.linear((weights @ v).transpose(1, 2).flatten(2), p.proj_weight, p.proj_bias)
    if p.down_weight is None:
        return x + a
    return x + a + F.linear(F.gelu(F.linear(a, p.down_weight, p.down_bias)), p.up_weight, p.up_bias)


def adapter(
    x: Tensor,
    parameters: Any,
    *,
    residual: Tensor,
    skip: bool = False,
    scale: float = 1.0,
    row_scale: Tensor | None = None,
) -> Tensor:
    """An adapter and the residual it is added to: down, GELU, up (paper section 3.2).

    Args:
        x: [..., D], the adapter's input.
        parameters: the fields of :class:`cast_kernels.problem.AdapterParameters`.
        residual: [..., D].
        skip: whether x is added too.
        scale: factor of the adapter's branch.
        row_scale: broadcastable to x.shape[:-1], multiplies the adapter's branch.

    Returns:
        residual + [x +] row_scale * scale * (GELU(x Wd^T + bd) Wu^T + bu), [..., D].
    """
    p = parameters
    branch = F.linear(F.gelu(F.linear(x, p.down_weight, p.down_bias)), p.up_weight, p.up_bias)
    branch = scale * branch * (1.0 if row_scale is None else row_scale.expand(x.shape[:-1]).unsqueeze(-1))
    return residual + (x + branch if skip else branch)
