"""`CrossAttention`: one direction of the exchange, with the parameter names of the published checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cast_kernels.eager.bcast import attend, place
from cast_kernels.ops.bcast import check_table
from cast_kernels.plain import BARE_LINEAR, LINEAR, Reading
from cast_kernels.problem import Direction

#: direction -> (asking expert, answering expert); the published tables carry these names.
_ROLES = {"t2s": ("clip", "vmae"), "s2t": ("vmae", "clip")}
_AXES = {"time": ("time",), "space": ("space",), "space-time": ("time", "space")}


class CrossAttention(nn.Module):
    """One direction of the exchange. The op reads its parameters and fuses it with the layers around it.

    It is called only if one of its layers must be, see `cast_kernels.plain`. A `space-time` window has a time and a
    space table; the vector of a position is the sum of its rows in both. So every window shape has the same capacity,
    as the paper's table 1(e) demands.
    """

    direction: str
    window: str
    num_heads: int
    positions: bool

    def __init__(
        self, direction: str, window: str, dim: int, num_heads: int, frames: int, patches: int, positions: bool
    ) -> None:
        super().__init__()
        self.direction, self.window, self.num_heads, self.positions = direction, window, num_heads, positions
        lengths = {"time": frames, "space": patches}
        for expert in sorted(_ROLES[direction]) if positions else ():
            for axis in _AXES[window]:
                self.register_parameter(f"{expert}_{axis}_pos", nn.Parameter(torch.empty(lengths[axis], dim)))
        self.register_parameter(f"{direction}_q_bias", nn.Parameter(torch.empty(dim)))
        self.register_parameter(f"{direction}_kv_bias", nn.Parameter(torch.empty(2 * dim)))
        self.add_module(f"{direction}_q", nn.Linear(dim, dim, bias=False))
        self.add_module(f"{direction}_kv", nn.Linear(dim, 2 * dim, bias=False))
        # The published checkpoints call this projection t2s_proj in both directions.
        self.t2s_proj: nn.Linear = nn.Linear(dim, dim)
        self.reading: Reading = Reading(
            CrossAttention.forward,
            tensors=tuple(self._parameters),
            settings=("direction", "window", "positions"),
            layers={f"{direction}_q": BARE_LINEAR, f"{direction}_kv": BARE_LINEAR, "t2s_proj": LINEAR},
        )

    def reset_parameters(self) -> None:
        """Tables: normal with std head_dim^-0.5; linears: truncated normal with std 0.02; biases: zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("_pos"):
                nn.init.normal_(parameter, std=(parameter.shape[1] // self.num_heads) ** -0.5)
            elif name.endswith("weight"):
                nn.init.trunc_normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def forward(self, asking: Tensor, answering: Tensor, kernel: str = "auto") -> Tensor:
        """Asking and answering tokens, [B, T, N, d] each -> the attention's result for the asking tokens, [B, T, N, d].

        `kernel` names the attention: "auto" or "math".
        """
        return self.t2s_proj(attend(*self.projected(asking, answering), self.num_heads, self.window, kernel))

    def projected(self, asking: Tensor, answering: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, T, N, d], and keys before values [B, T, N, 2d], each layer called."""
        found = []
        for layer, x, expert in zip(("q", "kv"), (asking, answering), _ROLES[self.direction], strict=True):
            name, table = f"{self.direction}_{layer}", self._table(expert)
            check_table(f"{self.direction}.{layer}_pos", table, self.window, *x.shape[1:])
            y = self.get_submodule(name)(place(x, table, self.window))
            # In the dtype of y, as a linear layer adds its own bias under autocast.
            found.append(y + getattr(self, f"{name}_bias").to(y.dtype))
        return found[0], found[1]

    def _table(self, expert: str) -> Tensor | None:
        """[W, d]: the positions of one expert's tokens in this window."""
        if not self.positions:
            return None
        tables: list[Tensor] = [getattr(self, f"{expert}_{axis}_pos") for axis in _AXES[self.window]]
        if len(tables) == 1:
            return tables[0]
        return (tables[0][:, None] + tables[1][None]).flatten(0, 1)

    def names(self) -> list[str | None]:
        """Names of the tensors that :meth:`gathered` returns; "" for a table that is the sum of two."""
        axes, own = _AXES[self.window], self.direction
        tables = [f"{expert}_{axes[0]}_pos" if len(axes) == 1 else "" for expert in _ROLES[own]]
        layers = [f"{own}_q.weight", f"{own}_q_bias", f"{own}_kv.weight", f"{own}_kv_bias"]
        return [*(tables if self.positions else (None, None)), *layers, "t2s_proj.weight", "t2s_proj.bias"]

    def gathered(self) -> Direction:
        """The tensors in the op's terms. They are read as attributes: a parametrization computes them, FSDP makes them
        views."""
        asking, answering = _ROLES[self.direction]
        own, proj = self.direction, self.t2s_proj
        return Direction(
            q_pos=self._table(asking),
            kv_pos=self._table(answering),
            q_weight=getattr(self, f"{own}_q").weight,
            q_bias=getattr(self, f"{own}_q_bias"),
            kv_weight=getattr(self, f"{own}_kv").weight,
            kv_bias=getattr(self, f"{own}_kv_bias"),
            proj_weight=proj.weight,
            proj_bias=proj.bias,
        )
