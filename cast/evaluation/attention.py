"""Attention weights of the exchange between the two streams.

The kernels never store these weights. This module computes them from each block's input to its exchange, with the
paper's formula (section 3.3, equations 7 and 8; the scores are scaled as in the published code).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cast.model import CAST
from cast.model.block import CASTBlock
from cast_kernels import CrossAttention

Streams = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Attention:
    """Weights of one block in one direction, averaged over heads, on the CPU in float32.

    Args:
        window: the tokens that attend together: `time`, `space` or `space-time`.
        over_time: [B, T, T], weight from the asking frame (row) to the answering frame, mean over patches; rows sum to
            1. None for a `space` window, because a token there attends to its own frame only.
        over_space: [B, T, N], weight of each patch of each frame, mean over the asking tokens, times the number of
            patches: even attention gives 1. None for a `time` window, because a token there attends to its own patch
            only.
    """

    window: str
    over_time: Tensor | None
    over_space: Tensor | None


@torch.inference_mode()
def cross_attention(model: CAST, video: Tensor) -> list[dict[str, Attention]]:
    """The exchange's attention in every block that has one: direction (`t2s`, `s2t`) -> weights.

    `t2s`: spatial tokens ask, temporal ones answer. `s2t`: the reverse.

    Args:
        model: put into evaluation mode; it runs fused or not.
        video: [B, 3, frames, H, W], the model's input.
    """
    model.eval()
    with _recorded(model) as inputs:
        model.tokens(video)
    return [_of_block(block, *inputs[index]) for index, block in _exchanging(model)]


def _exchanging(model: CAST) -> Iterator[tuple[int, CASTBlock]]:
    yield from enumerate(block for _, block in model.cast_blocks() if block.directions)


@contextmanager
def _recorded(model: CAST) -> Iterator[Streams]:
    """Record the input of each block's exchange while the model runs."""
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
    down = {"s": block.cross_s_down(spatial), "t": block.cross_t_down(temporal)}
    streams = {"s": block.ln_s_cross(down["s"])[:, :, 1:], "t": block.ln_t_cross(down["t"])}
    found = {}
    for direction, window in zip(("t2s", "s2t"), block.windows, strict=True):
        if direction in block.directions:
            cross = block.get_submodule(f"{direction}_cross")
            if not isinstance(cross, CrossAttention):
                raise TypeError(
                    f"{direction}_cross was replaced by a {type(cross).__qualname__}, whose attention weights are not "
                    "known; put the CrossAttention back"
                )
            queries, answers = cross.projected(streams[direction[-1]], streams[direction[0]])
            mean = _weights(queries, answers[..., : queries.shape[-1]], block.num_heads, window)
            found[direction] = _reduced(mean, window, block.num_frames)
    return found


def _weights(queries: Tensor, keys: Tensor, heads: int, window: str) -> Tensor:
    """[B, T, N, d] each -> [B, groups, W, W] averaged over heads. A group's tokens attend together."""

    def grouped(x: Tensor) -> Tensor:
        """[B, groups, heads, W, d / heads]."""
        x = x.transpose(1, 2) if window == "time" else x if window == "space" else x.flatten(1, 2)[:, None]
        return x.unflatten(-1, (heads, -1)).transpose(-2, -3)

    queries, keys = grouped(queries), grouped(keys)
    mean = torch.zeros((), device=queries.device)
    for head in range(heads):  # one at a time, because a space-time window's scores are large
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
