"""B-CAST in PyTorch operators, the best that eager mode offers: what a user has without our kernels.

Against the published code: scores are never stored (but for attention="math"), the CLS row is never
concatenated before the up-projection, and heads are views instead of copies where the operators allow it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cast_kernels import attention
from cast_kernels.problem import Direction, Parameters, Problem, Stream, Verdict


def can_run(problem: Problem) -> Verdict:
    """Eager PyTorch runs every problem that passes the op's own checks."""
    return Verdict(True, "PyTorch operators run every shape, dtype and device")


def bcast(
    problem: Problem,
    spatial: Tensor,
    temporal: Tensor,
    parameters: Parameters,
    spatial_scale: Tensor | None,
    temporal_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Both streams after the exchange; shapes as in :func:`cast_kernels.bcast`."""
    u_s = _down(spatial, parameters.spatial, eps)
    u_t = _down(temporal, parameters.temporal, eps)
    patches = u_s[:, :, 1:]
    spatial_out, temporal_out = spatial, temporal
    if parameters.t2s is not None and problem.t2s_window is not None:
        asked = _cross_attention(patches, u_t, parameters.t2s, problem, problem.t2s_window)
        hidden = activate(u_s[:, :, :1], asked)
        spatial_out = add(spatial, _up(hidden, parameters.spatial), spatial_scale)
    if parameters.s2t is not None and problem.s2t_window is not None:
        asked = _cross_attention(u_t, patches, parameters.s2t, problem, problem.s2t_window)
        temporal_out = add(temporal, _up(F.gelu(asked), parameters.temporal), temporal_scale)
    return spatial_out, temporal_out


def _down(x: Tensor, p: Stream, eps: float) -> Tensor:
    return F.layer_norm(F.linear(x, p.down_weight, p.down_bias), p.norm_weight.shape, p.norm_weight, p.norm_bias, eps)


def _up(hidden: Tensor, p: Stream) -> Tensor:
    assert p.up_weight is not None
    return F.linear(hidden, p.up_weight, p.up_bias)


def add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """x + scale * branch; the scale is [B, tokens] or [B, 1]. The sum keeps the residual stream's dtype."""
    if scale is not None:
        branch = branch * scale[:, None, :, None].to(branch.dtype)
    return (x + branch).to(x.dtype)


def activate(cls: Tensor, asked: Tensor) -> Tensor:
    """What the spatial up-projection reads: CLS [B, T, 1, d], which attended to nothing, before what patches got."""
    return torch.cat([F.gelu(cls).to(asked.dtype), F.gelu(asked)], dim=2)


def _cross_attention(asking: Tensor, answering: Tensor, p: Direction, problem: Problem, window: str) -> Tensor:
    """[B, T, N, d] x2 -> [B, T, N, d]. Projections run on the streams' own layout; only heads are regrouped."""
    q = F.linear(place(asking, p.q_pos, window), p.q_weight, p.q_bias)
    kv = F.linear(place(answering, p.kv_pos, window), p.kv_weight, p.kv_bias)
    return F.linear(attend(q, kv, problem.num_heads, window, problem.attention), p.proj_weight, p.proj_bias)


def place(x: Tensor, table: Tensor | None, window: str) -> Tensor:
    """x [B, T, N, d] with the vector of each token's position in its window, [W, d], if there is a table."""
    if table is None:
        return x
    frames, patches, dim = x.shape[1:]
    rows = {"time": (frames, 1), "space": (1, patches), "space-time": (frames, patches)}[window]
    return x + table.view(*rows, dim)


def attend(q: Tensor, kv: Tensor, num_heads: int, window: str, kernel: str) -> Tensor:
    """Attention inside windows: queries [B, T, N, d], keys and values [B, T, N, 2d] -> [B, T, N, d].

    `kernel` is what attends, of :data:`cast_kernels.attention.EXCHANGE_ATTENTIONS`.
    """
    batch, frames, patches, dim = q.shape
    head_dim = dim // num_heads
    k, v = kv.split(dim, dim=-1)

    def grouped(x: Tensor) -> Tensor:
        """[groups, heads, W, head_dim]. Four dimensions: with five, inductor's CPU attention returns wrong shapes."""
        x = x.unflatten(-1, (num_heads, head_dim))
        if window == "time":
            return x.permute(0, 2, 3, 1, 4).flatten(0, 1)
        if window == "space":
            return x.flatten(0, 1).transpose(1, 2)
        return x.flatten(1, 2).transpose(1, 2)

    mixed = attention.mix(kernel, grouped(q), grouped(k), grouped(v))
    by_time = window == "time"
    mixed = mixed.unflatten(0, (batch, patches)).permute(0, 3, 1, 2, 4) if by_time else mixed.transpose(1, 2)
    return mixed.reshape(batch, frames, patches, dim)
