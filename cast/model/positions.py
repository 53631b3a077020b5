"""VideoMAE's fixed positions as a buffer that keeps its values when a module's memory is allocated anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from cast.model.layers import sincos_table


class FixedPositions(nn.Module):
    """A module with the table of :func:`cast.model.layers.sincos_table` as its buffer `pos_embed`, [1, T*N, D].

    No checkpoint has the table. `to_empty` and `load_state_dict(assign=True)` take a module out of
    `torch.device("meta")`; the table is then computed again. `to_empty` between other devices keeps its values.
    """

    pos_embed: Tensor

    def place_tokens(self, length: int, dim: int) -> None:
        """Make the table for `length` tokens of `dim` channels."""
        self.register_buffer("pos_embed", sincos_table(length, dim), persistent=False)
        self.register_load_state_dict_post_hook(_follow_parameters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.pos_embed
        super()._apply(fn, recurse)
        after = self.pos_embed
        if after is not before and not after.is_meta:
            with torch.no_grad():  # `fn` may have allocated memory without values
                after.copy_(_table(before) if before.is_meta else before)
        return self


def _follow_parameters(module: FixedPositions, _: Any) -> None:
    """Run after `load_state_dict(assign=True)`, which replaces meta parameters but not this buffer."""
    like = next((p for p in module.parameters() if p.is_floating_point() and not p.is_meta), None)
    if module.pos_embed.is_meta and like is not None:
        module.pos_embed = _table(module.pos_embed).to(like.device, like.dtype)


def _table(like: Tensor) -> Tensor:
    return sincos_table(like.shape[1], like.shape[2], "cpu")
