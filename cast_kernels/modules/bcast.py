"""`BCAST`: the exchange as an nn.Module, with the parameter names of the published checkpoints."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cast_kernels import attention as attentions
from cast_kernels import backends, plain
from cast_kernels import recompute as levels
from cast_kernels.eager.bcast import activate, add
from cast_kernels.modules.cross_attention import CrossAttention
from cast_kernels.ops import _signatures
from cast_kernels.ops.bcast import bcast, check_scale, check_streams, pose, spread_scale
from cast_kernels.problem import (
    DIRECTIONS,
    EPS,
    WINDOWS,
    BackendError,
    Direction,
    Parameters,
    Problem,
    Recompute,
    Stream,
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
        recompute: how much backward computes again, see :class:`cast_kernels.Recompute`, or "auto"
            (:mod:`cast_kernels.recompute`). May be set at any time.
        attention: `auto`, or `math`: second and forward-mode derivatives, in backend `eager` only. May be set at any
            time.

    Raises:
        ValueError: a size below 1, heads that do not divide, an unknown window, direction, backend, recompute or
            attention.
    """

    dim: int
    bottleneck_dim: int
    num_heads: int
    num_frames: int
    num_patches: int
    positions: bool

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
        recompute: Recompute | str = levels.AUTO,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "bottleneck_dim": bottleneck_dim, "num_heads": num_heads}
        _check_arguments(sizes | {"num_frames": num_frames, "num_patches": num_patches}, windows, directions)
        self.dim, self.bottleneck_dim, self.num_heads = dim, bottleneck_dim, num_heads
        self.num_frames, self.num_patches, self.positions = num_frames, num_patches, positions
        self.windows: tuple[str, str] = (windows[0], windows[1])
        self.directions: tuple[str, ...] = tuple(d for d in DIRECTIONS if d in directions)
        self.backend: str = backends.check_name(backend)
        self.recompute: str = levels.check(recompute)
        self.attention: str = attentions.check_exchange_name(attention)
        if self.directions:
            self.cross_s_down: nn.Linear = nn.Linear(dim, bottleneck_dim)
            self.cross_t_down: nn.Linear = nn.Linear(dim, bottleneck_dim)
            self.ln_s_cross: nn.LayerNorm = nn.LayerNorm(bottleneck_dim, eps=EPS)
            self.ln_t_cross: nn.LayerNorm = nn.LayerNorm(bottleneck_dim, eps=EPS)
        for direction, window in zip(DIRECTIONS, self.windows, strict=True):
            if direction in self.directions:
                cross = CrossAttention(direction, window, bottleneck_dim, num_heads, num_frames, num_patches, positions)
                self.add_module(f"{direction}_cross", cross)
                self.add_module(f"cross_{direction[-1]}_up", nn.Linear(bottleneck_dim, dim))
        #: The op's readings of the exchange's layers; a subclass may have other layers.
        self._layers = {name: _readings(name) for name in self._modules}
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
            down, norm = getattr(self, f"cross_{letter}_down"), getattr(self, f"ln_{letter}_cross")
            up = self._modules.get(f"cross_{letter}_up")
            up_weight, up_bias = (None, None) if up is None else (up.weight, up.bias)
            return Stream(down.weight, down.bias, norm.weight, norm.bias, up_weight, up_bias)  # type: ignore[arg-type]

        t2s, s2t = (getattr(self, f"{d}_cross").gathered() if d in self.directions else None for d in DIRECTIONS)
        return Parameters(stream("s"), stream("t"), t2s, s2t)

    def _names(self) -> list[str | None]:
        """Names of the tensors that :meth:`gathered` returns, in its order."""
        found: list[str | None] = []
        for letter in ("s", "t"):
            layers = [f"cross_{letter}_down", f"ln_{letter}_cross", f"cross_{letter}_up"]
            for layer in layers:
                found += [f"{layer}.{field}" if layer in self._modules else None for field in ("weight", "bias")]
        for direction in DIRECTIONS:
            cross = self._modules.get(f"{direction}_cross")
            if isinstance(cross, CrossAttention):
                found += [name and f"{direction}_cross.{name}" for name in cross.names()]
            else:
                found += [None] * len(Direction._fields)
        return found

    def _at_a_glance(self) -> Parameters | None:
        """The result of :meth:`gathered`, or None: ask :meth:`obstacle`."""
        tensors = plain.at_a_glance(self, self._modules)
        if tensors is None or self._modules["ln_s_cross"].eps != self._modules["ln_t_cross"].eps:  # type: ignore[union-attr]
            return None
        return Parameters.from_flat(tensors)

    def obstacle(self) -> str:
        """Names a layer of the exchange that must be called, and why; then no kernel can run the exchange. "" if none
        must.

        See :mod:`cast_kernels.plain`.
        """
        found = plain.global_obstacle() or plain.obstacle_among(self, self._layers)
        if not found and self.ln_s_cross.eps != self.ln_t_cross.eps:
            found = f"ln_s_cross has eps {self.ln_s_cross.eps}, ln_t_cross {self.ln_t_cross.eps}, and the op has one"
        return found

    def exchange(
        self,
        spatial: Tensor,
        temporal: Tensor,
        spatial_scale: Tensor | None = None,
        temporal_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` under another name, for a subclass with its own `forward`."""
        if not self.directions:
            return spatial, temporal
        parameters = self._at_a_glance()
        if parameters is None:
            found = self.obstacle()
            if found:
                plain.announce("the exchange", self.backend, found, self)
                return self._by_modules(spatial, temporal, spatial_scale, temporal_scale)
            plain.found_plain(self, self._modules, self._layers, self._names())
            parameters = self.gathered()
        return bcast(
            spatial,
            temporal,
            parameters,
            num_heads=self.num_heads,
            windows=self.windows,
            eps=self._modules["ln_s_cross"].eps,  # type: ignore[union-attr, arg-type]
            spatial_scale=spatial_scale,
            temporal_scale=temporal_scale,
            recompute=self.recompute,
            backend=self.backend,
            attention=self.attention,
        )

    def _by_modules(
        self, spatial: Tensor, temporal: Tensor, spatial_scale: Tensor | None, temporal_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The result of :func:`cast_kernels.bcast`, by a call of each layer."""
        check_streams(spatial, temporal)
        check_scale("spatial_scale", spatial_scale, spatial.shape[2], spatial)
        check_scale("temporal_scale", temporal_scale, 1, temporal)
        spatial_scale, temporal_scale = spread_scale(spatial_scale, spatial), spread_scale(temporal_scale, temporal, 1)
        u_s, u_t = self.ln_s_cross(self.cross_s_down(spatial)), self.ln_t_cross(self.cross_t_down(temporal))
        patches = u_s[:, :, 1:]
        spatial_out, temporal_out = spatial, temporal
        if "t2s" in self.directions:
            hidden = activate(u_s[:, :, :1], self._asked("t2s_cross", patches, u_t))
            spatial_out = add(spatial, self.get_submodule("cross_s_up")(hidden), spatial_scale)
        if "s2t" in self.directions:
            asked = F.gelu(self._asked("s2t_cross", u_t, patches))
            temporal_out = add(temporal, self.get_submodule("cross_t_up")(asked), temporal_scale)
        return spatial_out, temporal_out

    def _asked(self, name: str, asking: Tensor, answering: Tensor) -> Tensor:
        cross = self.get_submodule(name)
        if self.attention == "auto":
            return cross(asking, answering)
        if not isinstance(cross, CrossAttention):
            raise BackendError(
                f"attention={self.attention!r} was asked for, but {name} was replaced by a "
                f"{type(cross).__qualname__}, which attends in a way of its own; use attention='auto'"
            )
        return cross(asking, answering, self.attention)

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
            ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names them.
            BackendError: the named backend cannot run this problem.
        """
        return self.exchange(spatial, temporal, spatial_scale, temporal_scale)

    def problem(self, batch: int = 1) -> Problem:
        """This module's problem for a batch in its parameters' dtype and on their device."""
        weight = self.cross_s_down.weight
        windows = [w if d in self.directions else None for d, w in zip(DIRECTIONS, self.windows, strict=True)]
        return Problem(
            batch, self.num_frames, self.num_patches, self.dim, self.bottleneck_dim, self.num_heads,
            windows[0], windows[1], weight.dtype, weight.device.type, attention=self.attention,
            gpu=weight.device.index,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Sizes, windows and directions, and which backend runs the exchange, for `print`."""
        if not self.directions:
            return "directions=() (no exchange)"
        attention = "" if self.attention == "auto" else f", attention={self.attention!r}"
        found = self.obstacle()
        verdicts = f"{self.backend!r}"
        if found:
            verdicts += f" -> its modules in PyTorch ({found})"
        elif self.backend == "auto":
            verdicts += f" -> {backends.select('auto', self.problem())!r}"
        return (
            f"dim={self.dim}, bottleneck_dim={self.bottleneck_dim}, num_heads={self.num_heads}, "
            f"num_frames={self.num_frames}, num_patches={self.num_patches}, windows={self.windows}, "
            f"directions={self.directions}, positions={self.positions}, backend={verdicts}{attention}"
        )


def explain(module: BCAST, spatial: Tensor, temporal: Tensor) -> str:
    """Print, and return, the backends that can run `module(spatial, temporal)`, why the others cannot, and the selected
    one.

    Raises:
        ValueError, TypeError: as the call itself.
    """
    if not module.directions:
        text = "directions=(): the module is the identity, no backend runs"
    elif found := module.obstacle():
        check_streams(spatial, temporal)
        text = plain.verdict("the exchange", module.backend, found)
    else:
        problem = pose(spatial, temporal, module.gathered(), module.num_heads, module.windows, module.attention)
        text = f"{backends.explain(module.backend, problem)}\n{levels.explain(problem, temporal.device)}"
        if _signatures.FAULT:
            text += f"\n{_signatures.describe()}"
    print(text)
    return text


def _readings(layer: str) -> plain.Reading | None:
    """The op's reading of the exchange's layer with this name; None: the layer's own."""
    if layer.startswith("ln_"):
        return plain.NORM
    return None if layer.endswith("_cross") else plain.LINEAR


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
