"""`BCAST`: the exchange as an nn.Module, with the parameter names of the published checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cast_kernels import attention as attentions
from cast_kernels import backends
from cast_kernels.ops._checks import check_recompute
from cast_kernels.ops.bcast import bcast, pose
from cast_kernels.problem import DIRECTIONS, EPS, WINDOWS, Direction, Parameters, Problem, Recompute, Stream

#: direction -> (expert whose tokens ask, expert whose tokens answer); the published tables carry these names.
_ROLES = {"t2s": ("clip", "vmae"), "s2t": ("vmae", "clip")}
_AXES = {"time": ("time",), "space": ("space",), "space-time": ("time", "space")}


class CrossAttention(nn.Module):
    """Parameters of one direction; the arithmetic is in the op, fused with what surrounds it.

    A `space-time` window has a time and a space table, whose sum over the axes gives each position its
    vector: the same capacity for every window shape, as the paper's table 1(e) demands.
    """

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
        self.t2s_proj = nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Tables: normal with std head_dim^-0.5; linears: truncated normal with std 0.02; biases: zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("_pos"):
                nn.init.normal_(parameter, std=(parameter.shape[1] // self.num_heads) ** -0.5)
            elif name.endswith("weight"):
                nn.init.trunc_normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def _table(self, expert: str) -> Tensor | None:
        """[W, d]: the positions of one expert's tokens in this window."""
        if not self.positions:
            return None
        tables = [self.get_parameter(f"{expert}_{axis}_pos") for axis in _AXES[self.window]]
        if len(tables) == 1:
            return tables[0]
        return (tables[0][:, None] + tables[1][None]).flatten(0, 1)

    def gathered(self) -> Direction:
        """The tensors in the op's terms."""
        asking, answering = _ROLES[self.direction]
        own = self.direction
        return Direction(
            q_pos=self._table(asking),
            kv_pos=self._table(answering),
            q_weight=self.get_parameter(f"{own}_q.weight"),
            q_bias=self.get_parameter(f"{own}_q_bias"),
            kv_weight=self.get_parameter(f"{own}_kv.weight"),
            kv_bias=self.get_parameter(f"{own}_kv_bias"),
            proj_weight=self.t2s_proj.weight,
            proj_bias=self.t2s_proj.bias,
        )


class BCAST(nn.Module):
    """Bottleneck Cross-Attention in Space and Time (paper section 3.3), both streams at once, fused.

    At initialisation the up-projections are zero, so the module returns its inputs exactly.

    Args:
        dim: D, width of both streams.
        bottleneck_dim: d, width inside the exchange (the paper's best ratio is D/2).
        num_heads: heads of the cross-attention; must divide `bottleneck_dim`.
        num_frames: T, frames of the exchange (input frames / tubelet).
        num_patches: N, patches a frame, without CLS.
        windows: shape of the (t2s, s2t) windows, each `time`, `space` or `space-time`.
        directions: any of `t2s` and `s2t`; with neither, the module is the identity and has no parameters.
        positions: whether positional embeddings are added (paper table 8).
        backend: `auto`, or the name of the one that must run. May be set at any time.
        recompute: what backward computes again, see :class:`cast_kernels.Recompute`. May be set at any time.
        attention: `auto`, or `math`: second and forward-mode derivatives, in backend `eager` only. May be set at any
            time.

    Raises:
        ValueError: a size below 1, heads that do not divide, an unknown window, direction, backend, recompute or
            attention.
    """

    def __init__(
        self,
        dim: int = 768,
        bottleneck_dim: int = 384,
        num_heads: int = 12,
        num_frames: int = 8,
        num_patches: int = 196,
        windows: tuple[str, str] = ("time", "space"),
        directions: tuple[str, ...] = DIRECTIONS,
        positions: bool = True,
        backend: str = "auto",
        recompute: Recompute | str = Recompute.CHEAP,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "bottleneck_dim": bottleneck_dim, "num_heads": num_heads}
        _check_arguments(sizes | {"num_frames": num_frames, "num_patches": num_patches}, windows, directions)
        self.dim, self.bottleneck_dim, self.num_heads = dim, bottleneck_dim, num_heads
        self.num_frames, self.num_patches, self.positions = num_frames, num_patches, positions
        self.windows = (windows[0], windows[1])
        self.directions = tuple(d for d in DIRECTIONS if d in directions)
        self.backend = backends.check_name(backend)
        self.recompute = check_recompute(recompute).value
        self.attention = attentions.check_exchange_name(attention)
        if self.directions:
            self.cross_s_down = nn.Linear(dim, bottleneck_dim)
            self.cross_t_down = nn.Linear(dim, bottleneck_dim)
            self.ln_s_cross = nn.LayerNorm(bottleneck_dim, eps=EPS)
            self.ln_t_cross = nn.LayerNorm(bottleneck_dim, eps=EPS)
        for direction, window in zip(DIRECTIONS, self.windows, strict=True):
            if direction in self.directions:
                cross = CrossAttention(direction, window, bottleneck_dim, num_heads, num_frames, num_patches, positions)
                self.add_module(f"{direction}_cross", cross)
                self.add_module(f"cross_{direction[-1]}_up", nn.Linear(bottleneck_dim, dim))
        self.reset_bcast_parameters()

    def reset_bcast_parameters(self) -> None:
        """Initialise all of the exchange as the published code does; the up-projections are zero."""
        for name, module in self.named_children():
            if isinstance(module, CrossAttention):
                module.reset_parameters()
            elif isinstance(module, nn.Linear) and name.startswith("cross_"):
                up = name.endswith("_up")
                (nn.init.zeros_ if up else lambda w: nn.init.trunc_normal_(w, std=0.02))(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm) and name in ("ln_s_cross", "ln_t_cross"):  # a subclass has others
                module.reset_parameters()

    def gathered(self) -> Parameters:
        """The module's tensors in the op's terms. At least one direction must be present."""

        def stream(letter: str) -> Stream:
            down, norm = self.get_submodule(f"cross_{letter}_down"), self.get_submodule(f"ln_{letter}_cross")
            up = getattr(self, f"cross_{letter}_up", None)
            up_weight, up_bias = (None, None) if up is None else (up.weight, up.bias)
            return Stream(down.weight, down.bias, norm.weight, norm.bias, up_weight, up_bias)  # type: ignore[arg-type]

        t2s, s2t = (getattr(self, f"{direction}_cross", None) for direction in DIRECTIONS)
        return Parameters(stream("s"), stream("t"), t2s and t2s.gathered(), s2t and s2t.gathered())

    def exchange(
        self,
        spatial: Tensor,
        temporal: Tensor,
        spatial_scale: Tensor | None = None,
        temporal_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` under a name that a subclass with a forward of its own can call."""
        if not self.directions:
            return spatial, temporal
        return bcast(
            spatial,
            temporal,
            self.gathered(),
            num_heads=self.num_heads,
            windows=self.windows,
            spatial_scale=spatial_scale,
            temporal_scale=temporal_scale,
            recompute=self.recompute,
            backend=self.backend,
            attention=self.attention,
        )

    def forward(
        self,
        spatial: Tensor,
        temporal: Tensor,
        spatial_scale: Tensor | None = None,
        temporal_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Exchange information between the streams.

        Args:
            spatial: [B, T, 1+N, D]; token 0 of each frame is CLS.
            temporal: [B, T, N, D].
            spatial_scale: drop-path factor of the spatial branch, [B], or [B, 1+N] a factor per token position.
            temporal_scale: drop-path factor of the temporal branch, [B].

        Returns:
            Both streams, residual added.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not fit; the message says what came.
            BackendError: the backend asked for cannot run this problem.
        """
        return self.exchange(spatial, temporal, spatial_scale, temporal_scale)

    def problem(self, batch: int = 1) -> Problem:
        """The problem that this module poses for a batch in its parameters' own dtype and device."""
        weight = self.cross_s_down.weight
        windows = [w if d in self.directions else None for d, w in zip(DIRECTIONS, self.windows, strict=True)]
        return Problem(
            batch, self.num_frames, self.num_patches, self.dim, self.bottleneck_dim, self.num_heads,
            windows[0], windows[1], weight.dtype, weight.device.type, attention=self.attention,
        )  # fmt: skip

    def extra_repr(self) -> str:
        if not self.directions:
            return "directions=() (no exchange)"
        attention = "" if self.attention == "auto" else f", attention={self.attention!r}"
        verdicts = f"{self.backend!r}"
        if self.backend == "auto":
            verdicts += f" -> {backends.select('auto', self.problem())!r}"
        return (
            f"dim={self.dim}, bottleneck_dim={self.bottleneck_dim}, num_heads={self.num_heads}, "
            f"num_frames={self.num_frames}, num_patches={self.num_patches}, windows={self.windows}, "
            f"directions={self.directions}, positions={self.positions}, backend={verdicts}{attention}"
        )


def explain(module: BCAST, spatial: Tensor, temporal: Tensor) -> str:
    """Print, and return, which backends can run `module(spatial, temporal)`, why not the others, and which one will.

    Raises:
        ValueError, TypeError: as the call itself.
    """
    if not module.directions:
        text = "directions=(): the module is the identity, no backend runs"
    else:
        problem = pose(spatial, temporal, module.gathered(), module.num_heads, module.windows, module.attention)
        text = backends.explain(module.backend, problem)
    print(text)
    return text


def _check_arguments(sizes: dict[str, int], windows: tuple[str, str], directions: tuple[str, ...]) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
    if sizes["bottleneck_dim"] % sizes["num_heads"]:
        raise ValueError(
            f"bottleneck_dim {sizes['bottleneck_dim']} is not divisible by num_heads {sizes['num_heads']}; "
            "every head needs the same whole number of channels"
        )
    if isinstance(windows, str) or len(windows) != 2 or any(w not in WINDOWS for w in windows):
        raise ValueError(f"windows is {windows!r}; it must be two (t2s, s2t) out of {', '.join(map(repr, WINDOWS))}")
    if isinstance(directions, str) or len(set(directions)) != len(directions) or not set(directions) <= set(DIRECTIONS):
        raise ValueError(f"directions is {directions!r}; allowed: a tuple of 't2s', 's2t', both or none, each once")
