"""VideoMAE's fixed positions as a buffer that stays right where a module's memory is made anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from cast.model.layers import sincos_table


class FixedPositions(nn.Module):
    """A module with the table of :func:`cast.model.layers.sincos_table` as its buffer `pos_embed`, [1, T*N, D].

    No checkpoint holds the table, so it has its values again wherever `to_empty` or `load_state_dict(assign=True)`
    takes the module out of `torch.device("meta")`, and keeps them where `to_empty` takes it elsewhere.
    """

    pos_embed: Tensor

    def place_tokens(self, length: int, dim: int) -> None:
        """Make the table, for so many tokens of so many channels."""
        self.register_buffer("pos_embed", sincos_table(length, dim), persistent=False)
        self.register_load_state_dict_post_hook(_follow_parameters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.pos_embed
        super()._apply(fn, recurse)
        after = self.pos_embed
        if after is not before and not after.is_meta:
            with torch.no_grad():  # `fn` may have made memory without values
                after.copy_(_table(before) if before.is_meta else before)
        return self


def _follow_parameters(module: FixedPositions, _: Any) -> None:
    """After `load_state_dict(assign=True)`, which makes the parameters real and no buffer that it does not load."""
    like = next((p for p in module.parameters() if p.is_floating_point() and not p.is_meta), None)
    if module.pos_embed.is_meta and like is not None:
        module.pos_embed = _table(module.pos_embed).to(like.device, like.dtype)


def _table(like: Tensor) -> Tensor:
    return sincos_table(like.shape[1], like.shape[2], "cpu")
