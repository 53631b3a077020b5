"""The exchange of two streams in a block: B-CAST in any roles, and the alternatives of Table 1(b) and (c).

Every module starts as the identity. It takes and returns both streams, [B, T, C+N, D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cast.model.config import CASTConfig
from cast.model.layers import VMAE_EPS, Adapter, Running, init_linears
from cast_kernels import BCAST, attention

Pair = tuple[Tensor, Tensor]
#: (spatial, temporal) numbers of leading tokens that are no patches.
Prefixes = tuple[int, int]


class Exchange(nn.Module):
    """Base class with the streams' prefixes.

    Args:
        config: sizes, windows, directions, positions.
        prefixes: C of the spatial and of the temporal stream.
        running: how ops run.
    """

    config: CASTConfig
    prefixes: Prefixes
    running: Running

    def __init__(self, config: CASTConfig, prefixes: Prefixes, running: Running) -> None:
        super().__init__()
        self.config, self.prefixes, self.running = config, prefixes, running

    def forward(self, spatial: Tensor, temporal: Tensor, factors: tuple[Tensor | None, Tensor | None]) -> Pair:
        """Both streams with the parts that they took from each other; `factors` are drop-path draws [B], or None."""
        raise NotImplementedError


class Bottleneck(Exchange):
    """B-CAST (paper section 3.3) between streams with or without CLS.

    If the temporal-role expert has CLS, its CLS takes the same path as the spatial one's: down, norm, GELU, up, without
    attention. The paper does not specify CLS in other roles (Table 1(h)); this is our reading.
    """

    def __init__(self, config: CASTConfig, prefixes: Prefixes, running: Running) -> None:
        super().__init__(config, prefixes, running)
        self.bcast: BCAST = BCAST(
            **config.exchange_sizes(),
            directions=config.directions,
            backend=running.backend,
            recompute=running.recompute,
            attention=attention.of_exchange(running.attention),
        )

    def forward(self, spatial: Tensor, temporal: Tensor, factors: tuple[Tensor | None, Tensor | None]) -> Pair:
        patches = temporal[:, :, self.prefixes[1] :]
        cls = temporal[:, :, : self.prefixes[1]]
        if not self.prefixes[0]:
            spatial = F.pad(spatial, (0, 0, 1, 0))  # CLS for the op; it influences no other token
        spatial, patches = self.bcast(spatial.contiguous(), patches.contiguous(), *factors)
        if self.prefixes[1] and "s2t" in self.bcast.directions:
            hidden = self.bcast.ln_t_cross(self.bcast.cross_t_down(cls))
            up = self.bcast.get_submodule("cross_t_up")
            cls = cls + scaled(up(F.gelu(hidden)), factors[1])
        return spatial[:, :, 1 - self.prefixes[0] :], torch.cat((cls, patches), 2)


class Lateral(Exchange):
    """Table 1(b) 'Lateral': a linear layer maps each stream's patches, and the result is added to the other's patches.

    Both sums read the streams before the exchange. The paper leaves two points open. Here the linear layers start at
    zero, so that the fully tuned experts start as pre-trained; and CLS takes no part.
    """

    t2s: nn.Linear
    s2t: nn.Linear

    def __init__(self, config: CASTConfig, prefixes: Prefixes, running: Running) -> None:
        super().__init__(config, prefixes, running)
        self.t2s, self.s2t = (nn.Linear(config.embed_dim, config.embed_dim) for _ in range(2))
        zero(self.t2s, self.s2t)

    def forward(self, spatial: Tensor, temporal: Tensor, factors: tuple[Tensor | None, Tensor | None]) -> Pair:
        from_spatial, from_temporal = spatial[:, :, self.prefixes[0] :], temporal[:, :, self.prefixes[1] :]
        return (
            add_to_patches(spatial, scaled(self.t2s(from_temporal), factors[0]), self.prefixes[0]),
            add_to_patches(temporal, scaled(self.s2t(from_spatial), factors[1]), self.prefixes[1]),
        )


class Wide(Exchange):
    """Table 1(c) 'w/o adapter': cross-attention at the full width, without the bottleneck around it.

    With `adapted`, 'X-attn.->adapter': an adapter follows the attention, before the sum. Windows, positions and norms
    are B-CAST's. The paper leaves two points open. Here the experts keep their own adapters, and the last layer before
    the sum starts at zero. No construction that we found gives the paper's 85.9 M and 93.0 M tuned parameters. This one
    gives their difference, two adapters a block.
    """

    ln_s: nn.LayerNorm
    ln_t: nn.LayerNorm
    t2s: CrossAttention
    s2t: CrossAttention

    def __init__(self, config: CASTConfig, prefixes: Prefixes, running: Running, adapted: bool) -> None:
        super().__init__(config, prefixes, running)
        self.ln_s, self.ln_t = (nn.LayerNorm(config.embed_dim, eps=VMAE_EPS) for _ in range(2))
        self.t2s, self.s2t = (
            CrossAttention(config, window, attention.of_exchange(running.attention)) for window in config.windows
        )
        init_linears(self)
        if adapted:
            self.S_Cross_Adapter: Adapter = Adapter(config.embed_dim, config.adapter_dim)
            self.T_Cross_Adapter: Adapter = Adapter(config.embed_dim, config.adapter_dim)
            init_linears(self.S_Cross_Adapter, self.T_Cross_Adapter)
        else:
            zero(self.t2s.proj, self.s2t.proj)
        self.adapted = adapted

    def forward(self, spatial: Tensor, temporal: Tensor, factors: tuple[Tensor | None, Tensor | None]) -> Pair:
        s = self.ln_s(spatial[:, :, self.prefixes[0] :])
        t = self.ln_t(temporal[:, :, self.prefixes[1] :])
        to_spatial, to_temporal = self.t2s(s, t), self.s2t(t, s)
        if self.adapted:
            to_spatial, to_temporal = self.S_Cross_Adapter(to_spatial), self.T_Cross_Adapter(to_temporal)
        return (
            add_to_patches(spatial, scaled(to_spatial, factors[0]), self.prefixes[0]),
            add_to_patches(temporal, scaled(to_temporal, factors[1]), self.prefixes[1]),
        )


class CrossAttention(nn.Module):
    """Multi-head cross-attention at width D inside windows: asking and answering [B, T, N, D] -> [B, T, N, D]."""

    num_heads: int
    window: str
    attention: str
    q: nn.Linear
    kv: nn.Linear
    proj: nn.Linear

    def __init__(self, config: CASTConfig, window: str, attention: str = "auto") -> None:
        super().__init__()
        dim, self.num_heads, self.window, self.attention = config.embed_dim, config.num_heads, window, attention
        axes = {"time": (config.exchange_frames, 1), "space": (1, config.num_patches)}
        shapes = {axis: shape for axis, shape in axes.items() if axis in window.split("-")} if config.positions else {}
        for axis, shape in shapes.items():
            for side in ("q", "kv"):
                table = nn.Parameter(torch.randn(*shape, dim) * (dim // self.num_heads) ** -0.5)
                self.register_parameter(f"{side}_{axis}_pos", table)
        self.axes: tuple[str, ...] = tuple(shapes)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, asking: Tensor, answering: Tensor) -> Tensor:
        group, ungroup = WINDOWED[self.window]
        frames = asking.shape[1]
        q = self._heads(group(self.q(self._placed(asking, "q"))))
        k, v = (self._heads(group(x)) for x in self.kv(self._placed(answering, "kv")).chunk(2, -1))
        mixed = attention.mix(self.attention, q, k, v).transpose(-2, -3).flatten(-2)
        return self.proj(ungroup(mixed, frames))

    def _placed(self, x: Tensor, side: str) -> Tensor:
        for axis in self.axes:
            x = x + self.get_parameter(f"{side}_{axis}_pos")
        return x

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)


#: window -> ([B, T, N, D] to groups of tokens that attend together, [..., W, D]; and the inverse, given T).
WINDOWED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "time": (lambda x: x.transpose(1, 2), lambda x, frames: x.transpose(1, 2)),
    "space": (lambda x: x, lambda x, frames: x),
    "space-time": (lambda x: x.flatten(1, 2), lambda x, frames: x.unflatten(1, (frames, -1))),
}


def add_to_patches(x: Tensor, more: Tensor, prefix: int) -> Tensor:
    """x [B, T, C+N, D] with `more` [B, T, N, D] added after its first C tokens."""
    return torch.cat((x[:, :, :prefix], x[:, :, prefix:] + more), 2) if prefix else x + more


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """x [B, ...] times one factor for each clip, [B]."""
    return x if factor is None else x * factor[:, None, None, None]


def zero(*linears: nn.Linear) -> None:
    for linear in linears:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
