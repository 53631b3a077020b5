"""What the two streams look at in each other: the exchange's attention weights, computed beside the model.

The kernels never store these weights, so they are computed here from each block's input to its exchange, with the
formula of the paper (section 3.3, equations 7 and 8; the scores are scaled as in the published code).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cast.block import CASTBlock
from cast.model import CAST

Streams = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Attention:
    """Weights of one block in one direction, averaged over heads, on the CPU in float32.

    Args:
        window: which tokens attend together, `time`, `space` or `space-time`.
        over_time: [B, T, T], asking moment by answering moment, mean over patches; None for a `space` window, where
            a token looks at its own moment only. Rows sum to 1.
        over_space: [B, T, N], how much each patch of each frame is looked at, mean over the asking tokens, times the
            number of patches: 1 is what even attention gives; None for a `time` window, where a token looks at its
            own patch only.
    """

    window: str
    over_time: Tensor | None
    over_space: Tensor | None


@torch.inference_mode()
def cross_attention(model: CAST, video: Tensor) -> list[dict[str, Attention]]:
    """The exchange's attention in every block that has one: direction (`t2s`, `s2t`) -> weights.

    `t2s`: spatial tokens ask, temporal ones answer. `s2t`: the other way round.

    Args:
        model: put into evaluation mode; it runs as it is, fused or not.
        video: [B, 3, frames, H, W], as the model takes it.
    """
    model.eval()
    with _recorded(model) as inputs:
        model.tokens(video)
    return [_of_block(block, *inputs[index]) for index, block in _exchanging(model)]


def _exchanging(model: CAST) -> Iterator[tuple[int, CASTBlock]]:
    blocks = [block for block in model.blocks if isinstance(block, CASTBlock) and block.directions]
    yield from enumerate(blocks)


@contextmanager
def _recorded(model: CAST) -> Iterator[Streams]:
    """Collects what enters each block's exchange while the model runs."""
    inputs: Streams = []
    blocks = [block for _, block in _exchanging(model)]

    def recorder(block: CASTBlock) -> Any:
        exchange = block.exchange

        def record(spatial: Tensor, temporal: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            inputs.append((spatial, temporal))
            return exchange(spatial, temporal, *rest)

        return record

    try:
        for block in blocks:
            block.exchange = recorder(block)  # type: ignore[method-assign]
        yield inputs
    finally:
        for block in blocks:
            del block.exchange


def _of_block(block: CASTBlock, spatial: Tensor, temporal: Tensor) -> dict[str, Attention]:
    parameters = block.gathered()

    def down(x: Tensor, stream: Any) -> Tensor:
        hidden = F.linear(x, stream.down_weight, stream.down_bias)
        norm = block.ln_s_cross
        assert isinstance(norm, torch.nn.LayerNorm)
        return F.layer_norm(hidden, hidden.shape[-1:], stream.norm_weight, stream.norm_bias, norm.eps)

    streams = {"s": down(spatial, parameters.spatial)[:, :, 1:], "t": down(temporal, parameters.temporal)}
    found = {}
    for direction, window in zip(("t2s", "s2t"), block.windows, strict=True):
        weights = getattr(parameters, direction)
        if weights is not None:
            asking, answering = streams[direction[-1]], streams[direction[0]]
            mean = _weights(asking, answering, weights, block.num_heads, window)
            found[direction] = _reduced(mean, window, block.num_frames)
    return found


def _weights(asking: Tensor, answering: Tensor, p: Any, heads: int, window: str) -> Tensor:
    """[B, T, N, d] each -> [B, groups, W, W] averaged over heads; one group holds the tokens that attend together."""

    def grouped(x: Tensor) -> Tensor:
        """[B, groups, W, d]."""
        if window == "time":
            return x.transpose(1, 2)
        return x if window == "space" else x.flatten(1, 2)[:, None]

    def split(x: Tensor) -> Tensor:
        """[B, groups, heads, W, d / heads]."""
        return x.unflatten(-1, (heads, -1)).transpose(-2, -3)

    asking, answering = grouped(asking), grouped(answering)
    asking = asking if p.q_pos is None else asking + p.q_pos
    answering = answering if p.kv_pos is None else answering + p.kv_pos
    width = asking.shape[-1]
    queries = split(F.linear(asking, p.q_weight, p.q_bias))
    keys = split(F.linear(answering, p.kv_weight[:width], p.kv_bias[:width]))
    mean = torch.zeros((), device=queries.device)
    for head in range(heads):  # one at a time: a space-time window's scores are large
        scores = queries[:, :, head] @ keys[:, :, head].transpose(-1, -2)
        mean = mean + (scores.float() * queries.shape[-1] ** -0.5).softmax(-1) / heads
    return mean


def _reduced(weights: Tensor, window: str, frames: int) -> Attention:
    weights = weights.cpu()
    if window == "time":  # [B, N, T, T]
        return Attention(window, weights.mean(1), None)
    if window == "space":  # [B, T, N, N]
        return Attention(window, None, weights.mean(2) * weights.shape[-1])
    by_axes = weights[:, 0].unflatten(-1, (frames, -1)).unflatten(1, (frames, -1))  # [B, T, N, T, N]
    tokens = weights.shape[-1]
    return Attention(window, by_axes.sum(-1).mean(2), by_axes.mean((1, 2)) * tokens)
