"""Each op's problem and parameters: sizes and circumstances, and the order of the parameter tensors.

Whether and how a backend runs depends only on the op's problem (:class:`Problem` for B-CAST, :class:`FFNProblem`,
:class:`SelfAttentionProblem`, :class:`AdapterProblem`). Besides the streams, kernels read only the op's parameters. All
backends share both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

#: Window shape -> number of tokens that attend together, from (frames, patches).
WINDOWS: dict[str, Callable[[int, int], int]] = {
    "time": lambda frames, patches: frames,
    "space": lambda frames, patches: patches,
    "space-time": lambda frames, patches: frames * patches,
}

#: The two ways information flows: temporal to spatial, spatial to temporal.
DIRECTIONS = ("t2s", "s2t")


class Recompute(StrEnum):
    """How much backward computes again instead of reading it from memory: memory against time.

    Backward computes the same values by the same formulas. Each op's documentation defines its three levels, and says
    whether gradients have the same bits with all. Backends that leave this to PyTorch's autograd ignore it.
    """

    NOTHING = "nothing"  #: keep every intermediate that backward reads: fastest
    CHEAP = "cheap"  #: keep the values that take long to compute for their size: the default
    ALL = "all"  #: keep the inputs and no more than a few numbers a row: smallest


#: LayerNorm epsilon of the published B-CAST (not PyTorch's 1e-5).
EPS = 1e-6


class Stream(NamedTuple):
    """Parameters of one stream. `up_*` are absent if the stream receives nothing."""

    down_weight: Tensor  #: [d, D]
    down_bias: Tensor  #: [d]
    norm_weight: Tensor  #: [d]
    norm_bias: Tensor  #: [d]
    up_weight: Tensor | None  #: [D, d]
    up_bias: Tensor | None  #: [D]


class Direction(NamedTuple):
    """Parameters of one direction's cross-attention; W is the window's length."""

    q_pos: Tensor | None  #: [W, d], added to the asking stream
    kv_pos: Tensor | None  #: [W, d], added to the answering stream: to keys and values
    q_weight: Tensor  #: [d, d]
    q_bias: Tensor  #: [d]
    kv_weight: Tensor  #: [2d, d], keys first
    kv_bias: Tensor  #: [2d]
    proj_weight: Tensor  #: [d, d]
    proj_bias: Tensor  #: [d]


class Parameters(NamedTuple):
    """All parameters of one B-CAST. A direction that is absent is None."""

    spatial: Stream  #: of the stream that has CLS tokens
    temporal: Stream  #: of the other one
    t2s: Direction | None  #: temporal to spatial
    s2t: Direction | None  #: spatial to temporal

    def flat(self) -> list[Tensor | None]:
        """The tensors in the order of :data:`PARAMETER_NAMES`, None where one is absent."""
        t2s = self.t2s or (None,) * len(Direction._fields)
        s2t = self.s2t or (None,) * len(Direction._fields)
        return [*self.spatial, *self.temporal, *t2s, *s2t]

    @classmethod
    def from_flat(cls, tensors: Sequence[Tensor | None]) -> Parameters:
        """The inverse of :meth:`flat`."""
        n, m = len(Stream._fields), len(Direction._fields)
        t2s, s2t = tensors[2 * n : 2 * n + m], tensors[2 * n + m :]
        return cls(
            Stream(*tensors[:n]),  # type: ignore[arg-type]
            Stream(*tensors[n : 2 * n]),  # type: ignore[arg-type]
            Direction(*t2s) if t2s[2] is not None else None,  # type: ignore[arg-type]
            Direction(*s2t) if s2t[2] is not None else None,  # type: ignore[arg-type]
        )


#: The canonical order: 6 + 6 stream tensors, then 8 + 8 direction tensors. csrc/cpu/bcast.h repeats it.
PARAMETER_NAMES: tuple[str, ...] = tuple(
    f"{owner}_{field}"
    for owner, kind in (("spatial", Stream), ("temporal", Stream), ("t2s", Direction), ("s2t", Direction))
    for field in kind._fields
)


class _Arithmetic:
    """The arithmetic that follows from a problem's dtypes."""

    dtype: torch.dtype
    autocast: torch.dtype | None

    @property
    def compute(self) -> torch.dtype:
        """The dtype of dense products' operands, as in PyTorch: autocast's, or the streams'."""
        return self.autocast or self.dtype

    @property
    def bf16(self) -> bool:
        """Whether dense products may round their operands to bfloat16."""
        return self.compute == torch.bfloat16


@dataclass(frozen=True)
class Problem(_Arithmetic):
    """One call's sizes and circumstances. Backend selection reads nothing else.

    Sizes may be symbolic under torch.compile. A window is None if its direction is absent.
    """

    batch: int  #: B, clips
    frames: int  #: T
    patches: int  #: N, without CLS
    dim: int  #: D, width of the streams
    bottleneck_dim: int  #: d, width inside the exchange
    num_heads: int  #: heads of d / heads channels
    t2s_window: str | None  #: a word of `WINDOWS`
    s2t_window: str | None  #: a word of `WINDOWS`
    dtype: torch.dtype  #: of the streams
    device: str  #: device type: "cpu", "cuda", "meta"
    autocast: torch.dtype | None = None  #: autocast's dtype where it is on
    #: "math" for derivatives that no kernel has, see :mod:`cast_kernels.attention`
    attention: str = "auto"
    gpu: int | None = None  #: number of the GPU, as two of a machine may differ; None: the current one, or none

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.bottleneck_dim // self.num_heads


#: Activations of the FFN: exact (erf) GELU, and x * sigmoid(1.702 x).
ACTIVATIONS = ("gelu", "quick_gelu")


class FFNParameters(NamedTuple):
    """Parameters of one expert block's FFN. Without an adapter its four tensors are None.

    The order is that of `csrc/cpu/ffn.h`.
    """

    norm_weight: Tensor  #: [D]
    norm_bias: Tensor  #: [D]
    fc1_weight: Tensor  #: [F, D]
    fc1_bias: Tensor  #: [F]
    fc2_weight: Tensor  #: [D, F]
    fc2_bias: Tensor  #: [D]
    down_weight: Tensor | None = None  #: [A, D]
    down_bias: Tensor | None = None  #: [A]
    up_weight: Tensor | None = None  #: [D, A]
    up_bias: Tensor | None = None  #: [D]

    @property
    def adapter(self) -> AdapterParameters:
        """The adapter's own."""
        return AdapterParameters(self.down_weight, self.down_bias, self.up_weight, self.up_bias)  # type: ignore[arg-type]


@dataclass(frozen=True)
class FFNProblem(_Arithmetic):
    """One FFN call's sizes and circumstances. Sizes may be symbolic under torch.compile."""

    rows: int  #: tokens: the product of all leading dimensions
    dim: int  #: D, width of the streams
    hidden: int  #: F, width inside the FFN
    adapter: int  #: A, width inside the adapter; 0: no adapter
    activation: str  #: a word of `ACTIVATIONS`
    recompute: Recompute  #: how much backward computes again
    dtype: torch.dtype  #: of the streams
    device: str  #: device type: "cpu", "cuda", "meta"
    autocast: torch.dtype | None = None  #: autocast's dtype where it is on
    gpu: int | None = None  #: number of the GPU, as two of a machine may differ; None: the current one, or none


class SelfAttentionParameters(NamedTuple):
    """Parameters of one expert block's self-attention. Without an adapter its four tensors are None.

    The order is that of `csrc/cpu/self_attention.h`.
    """

    norm_weight: Tensor  #: [D]
    norm_bias: Tensor  #: [D]
    qkv_weight: Tensor  #: [3D, D], queries, keys, values
    qkv_bias: Tensor | None  #: [3D]
    proj_weight: Tensor  #: [D, D]
    proj_bias: Tensor  #: [D]
    down_weight: Tensor | None = None  #: [A, D]
    down_bias: Tensor | None = None  #: [A]
    up_weight: Tensor | None = None  #: [D, A]
    up_bias: Tensor | None = None  #: [D]

    @property
    def before(self) -> ProjectionParameters:
        """Parameters of the layers before attention."""
        return ProjectionParameters(self.norm_weight, self.norm_bias, self.qkv_weight, self.qkv_bias)

    @property
    def adapter(self) -> AdapterParameters:
        """The adapter's own."""
        return AdapterParameters(self.down_weight, self.down_bias, self.up_weight, self.up_bias)  # type: ignore[arg-type]


class ProjectionParameters(NamedTuple):
    """Parameters of the layers before attention: the first four of :class:`SelfAttentionParameters`."""

    norm_weight: Tensor  #: [D]
    norm_bias: Tensor  #: [D]
    qkv_weight: Tensor  #: [3D, D], queries, keys, values
    qkv_bias: Tensor | None  #: [3D]


@dataclass(frozen=True)
class SelfAttentionProblem(_Arithmetic):
    """One self-attention call's sizes and circumstances. Sizes may be symbolic under torch.compile."""

    batch: int  #: groups of tokens: clips, or frames
    tokens: int  #: that attend together
    dim: int  #: D, width of the streams
    num_heads: int  #: heads of D / heads channels
    adapter: int  #: A, width inside the adapter; 0: no adapter
    recompute: Recompute  #: how much backward computes again
    dtype: torch.dtype  #: of the streams
    device: str  #: device type: "cpu", "cuda", "meta"
    autocast: torch.dtype | None = None  #: autocast's dtype where it is on
    attention: str = "auto"  #: which attention kernel was asked for, see :mod:`cast_kernels.attention`
    gpu: int | None = None  #: number of the GPU, as two of a machine may differ; None: the current one, or none

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.num_heads


class AdapterParameters(NamedTuple):
    """Parameters of one adapter."""

    down_weight: Tensor  #: [A, D]
    down_bias: Tensor  #: [A]
    up_weight: Tensor  #: [D, A]
    up_bias: Tensor  #: [D]


@dataclass(frozen=True)
class AdapterProblem(_Arithmetic):
    """One adapter call's sizes and circumstances. Sizes may be symbolic under torch.compile."""

    rows: int  #: tokens: the product of all leading dimensions
    dim: int  #: D, width of the streams
    adapter: int  #: A, width inside the adapter
    skip: bool  #: whether the adapter's input is added too
    recompute: Recompute  #: how much backward computes again
    dtype: torch.dtype  #: of the residual stream
    device: str  #: device type: "cpu", "cuda", "meta"
    autocast: torch.dtype | None = None  #: autocast's dtype where it is on
    gpu: int | None = None  #: number of the GPU, as two of a machine may differ; None: the current one, or none


class Verdict(NamedTuple):
    """Whether a backend can run a problem, and why or why not."""

    ok: bool  #: whether it can
    reason: str  #: why, or why not


class BackendError(RuntimeError):
    """The named backend or attention cannot run this problem."""
