"""The op `bcast`: public function, argument checks, and the registered operator that kernel backends share.

Read from the bottom up for the machinery, from the top down for the use:

    bcast()                         checks the arguments, selects a backend
      -> eager: PyTorch operators, seen through by compilers and autograd
      -> kernels: torch.ops.cast_kernels.bcast (schema, fake, autograd, FLOP formula), or straight to the backend
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cast_kernels.eager.bcast as eager_bcast
from cast_kernels import attention as attentions
from cast_kernels import backends
from cast_kernels import recompute as levels
from cast_kernels.ops._checks import (
    autocast_dtype,
    check_kinds,
    check_parameters,
    check_shape,
    check_tensors,
)
from cast_kernels.ops._operator import Call, Operator
from cast_kernels.ops._signatures import listed
from cast_kernels.problem import DIRECTIONS, EPS, WINDOWS, Direction, Parameters, Problem, Recompute, Stream


def bcast(
    spatial: Tensor,
    temporal: Tensor,
    parameters: Parameters,
    *,
    num_heads: int,
    windows: tuple[str, str] = ("time", "space"),
    eps: float = EPS,
    spatial_scale: Tensor | None = None,
    temporal_scale: Tensor | None = None,
    recompute: Recompute | str = levels.AUTO,
    backend: str = "auto",
    attention: str = "auto",
) -> tuple[Tensor, Tensor]:
    """B-CAST: both streams exchange information through a bottleneck (paper section 3.3).

    Args:
        spatial: [B, T, 1+N, D]; token 0 of each frame is CLS. Any strides.
        temporal: [B, T, N, D], same dtype and device. Any strides.
        parameters: weights; a direction that is None is left out.
        num_heads: heads of the cross-attention; divides d.
        windows: shape of the (t2s, s2t) windows, see :data:`cast_kernels.WINDOWS`.
        eps: LayerNorm epsilon.
        spatial_scale: factor of the spatial branch before the residual sum, [B] or [B, 1+N]; constant.
        temporal_scale: factor of the temporal branch, [B]; constant.
        recompute: how much backward computes again, see :class:`cast_kernels.Recompute`; "auto" decides by shapes and
            the device's memory (:mod:`cast_kernels.recompute`). Backend eager ignores it.
        backend: "auto", or the one that must run.
        attention: "auto", or "math": two matrix products and a softmax, with second and forward-mode derivatives; only
            backend eager runs it.

    Returns:
        Both streams with their branch added, in the dtype they came in; a stream that receives nothing is
        returned as it came. Under autocast, backends that compute in float32 do so.

    Raises:
        ValueError: a shape, size or device that does not fit, or no value of Recompute.
        TypeError: dtypes that are mixed or not floating.
        BackendError: `backend` cannot run this problem.
        NotImplementedError: a kernel is differentiated twice, or in forward mode.
    """
    arguments, known = (num_heads, windows, eps, recompute, backend, attention), None
    scales = (spatial_scale, temporal_scale)
    if _is_plain(parameters):
        flat = parameters.flat()
        known = OPERATOR.recall(arguments, listed(spatial, temporal, *flat, *scales))
    if known is None:
        levels.check(recompute)
        problem = pose(spatial, temporal, parameters, num_heads, windows, attention)
        check_scale("spatial_scale", spatial_scale, 1 + problem.patches, spatial)
        check_scale("temporal_scale", temporal_scale, 1, temporal)
        flat = parameters.flat()
        known = OPERATOR.settle(
            arguments, listed(spatial, temporal, *flat, *scales), problem,
            backends.select(backend, problem), levels.resolve(recompute, problem, temporal.device).value,
            (num_heads, problem.t2s_window or "", problem.s2t_window or "", float(eps)),
        )  # fmt: skip
    if parameters.t2s is None and parameters.s2t is None:
        return spatial, temporal
    factors = spread_scale(spatial_scale, spatial), spread_scale(temporal_scale, temporal, 1)
    if known.call.backend == "eager":
        return eager_bcast.bcast(known.call.problem, spatial, temporal, parameters, *factors, eps)
    outputs = OPERATOR.run(known, (spatial, temporal), parameters, flat, factors)
    return (
        outputs[0] if parameters.t2s is not None else spatial,
        outputs[1] if parameters.s2t is not None else temporal,
    )


def _is_plain(parameters: object) -> bool:
    """Whether the parameters have exactly these types, so that `flat` works."""
    return (
        type(parameters) is Parameters
        and type(parameters.spatial) is type(parameters.temporal) is Stream
        and all(way is None or type(way) is Direction for way in parameters[2:])
    )


def pose(
    spatial: Tensor,
    temporal: Tensor,
    parameters: Parameters,
    num_heads: int,
    windows: tuple[str, str],
    attention: str = "auto",
) -> Problem:
    """Check the arguments of :func:`bcast` and return the problem they pose.

    Raises:
        ValueError, TypeError: as :func:`bcast`.
    """
    check_streams(spatial, temporal)
    _check_types(parameters)
    batch, frames, patches, dim = temporal.shape
    if len(windows) != 2 or any(w not in WINDOWS for w in windows):
        raise ValueError(f"windows is {windows!r}; it must be two (t2s, s2t) out of {', '.join(map(repr, WINDOWS))}")
    bottleneck = parameters.spatial.down_weight.shape[0]
    if num_heads < 1 or bottleneck % num_heads:
        raise ValueError(f"num_heads is {num_heads}; it must divide the bottleneck's {bottleneck} channels")
    problem = Problem(
        batch, frames, patches, dim, bottleneck, num_heads,
        windows[0] if parameters.t2s is not None else None,
        windows[1] if parameters.s2t is not None else None,
        spatial.dtype, spatial.device.type, autocast_dtype(spatial), attentions.check_exchange_name(attention),
        gpu=spatial.device.index,
    )  # fmt: skip
    _check_parameters(problem, parameters)
    streams = {"spatial": spatial, "temporal": temporal}
    check_kinds(streams, parameters.flat(), problem.autocast is not None)
    return problem


def _check_types(parameters: Parameters) -> None:
    """Raise TypeError unless streams and directions hold tensors; a direction and single fields may be None."""
    if not isinstance(parameters, Parameters):
        raise TypeError(f"parameters is a {type(parameters).__qualname__}; it must be a cast_kernels.Parameters")
    for owner, tensors in parameters._asdict().items():
        if tensors is not None or owner not in DIRECTIONS:
            check_parameters(tensors, Direction if owner in DIRECTIONS else Stream, f"{owner}.")


def check_streams(spatial: Tensor, temporal: Tensor) -> None:
    """Raise ValueError unless the streams have the same B, T, N and D, and the spatial one CLS tokens besides.

    An argument that is no tensor is a TypeError.
    """
    check_tensors({"spatial": spatial, "temporal": temporal})
    for name, x in (("spatial", spatial), ("temporal", temporal)):
        if x.ndim != 4:
            layout = "[B, T, 1+N, D]" if name == "spatial" else "[B, T, N, D]"
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {layout}, 4 dimensions")
    batch, frames, patches, dim = temporal.shape
    if tuple(spatial.shape) != (batch, frames, patches + 1, dim):
        raise ValueError(
            f"spatial has shape {tuple(spatial.shape)} and temporal {tuple(temporal.shape)}; with this temporal, "
            f"spatial must be {(batch, frames, patches + 1, dim)}: same B, T and D, a CLS token before the N patches"
        )


def check_table(name: str, table: Tensor | None, window: str, frames: int, patches: int, dim: int) -> None:
    """Raise ValueError if there is a position table and it lacks a row for each token of a window."""
    length = WINDOWS[window](frames, patches)
    if table is not None and tuple(table.shape) != (length, dim):
        raise ValueError(
            f"{name} has shape {tuple(table.shape)}, but the streams have {frames} frames of {patches} patches: a "
            f"{window!r} window holds {length} tokens of {dim} channels, so the table must be {(length, dim)}"
        )


def _check_parameters(problem: Problem, parameters: Parameters) -> None:
    """Every parameter has the shape that the streams and the bottleneck imply."""
    dim, d = problem.dim, problem.bottleneck_dim
    stream = {"down_weight": (d, dim), "down_bias": (d,), "norm_weight": (d,), "norm_bias": (d,)}
    up = {"up_weight": (dim, d), "up_bias": (dim,)}
    cross = {"q_weight": (d, d), "q_bias": (d,), "kv_weight": (2 * d, d), "kv_bias": (2 * d,)}
    cross |= {"proj_weight": (d, d), "proj_bias": (d,)}
    owners = (
        ("spatial", parameters.spatial, stream | (up if parameters.t2s else {}), None),
        ("temporal", parameters.temporal, stream | (up if parameters.s2t else {}), None),
        ("t2s", parameters.t2s, cross, problem.t2s_window),
        ("s2t", parameters.s2t, cross, problem.s2t_window),
    )
    for owner, tensors, shapes, window in owners:
        if tensors is None:
            continue
        for field, shape in shapes.items():
            check_shape(f"{owner}.{field}", getattr(tensors, field), shape)
        if window is not None:
            for field in ("q_pos", "kv_pos"):
                table = getattr(tensors, field)
                check_table(f"{owner}.{field}", table, window, problem.frames, problem.patches, d)


def check_scale(name: str, scale: Tensor | None, tokens: int, like: Tensor) -> None:
    """A scale fits the stream `like`: [B], or [B, tokens].

    Raises:
        ValueError: another shape, another device, or a scale that requires a gradient.
        TypeError: no tensor, or a dtype that is not floating.
    """
    if scale is None:
        return
    check_tensors({name: scale})
    shape, batch = tuple(scale.shape), like.shape[0]
    if shape not in ((batch,), (batch, tokens)):
        allowed = f"[B] = {(batch,)}" + (f" or [B, 1+N] = {(batch, tokens)}" if tokens > 1 else "")
        raise ValueError(f"{name} has shape {shape}; it must be {allowed}")
    if not scale.is_floating_point():
        raise TypeError(f"{name} is {scale.dtype}; it must be floating point")
    if scale.device != like.device:
        raise ValueError(f"{name} lies on {scale.device}, the streams on {like.device}; move it there")
    if scale.requires_grad:
        raise ValueError(f"{name} requires a gradient, but drop-path factors are constants; pass {name}.detach()")


def spread_scale(scale: Tensor | None, like: Tensor, tokens: int | None = None) -> Tensor | None:
    """A checked scale as [B, tokens] in the stream's dtype; None for `tokens` means the stream's own."""
    if scale is None:
        return None
    batch = like.shape[0]
    return scale.reshape(batch, -1).expand(batch, tokens or like.shape[2]).to(like.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The registered operator. An output is empty for a stream that receives nothing.


class _BCast(Operator):
    name = "bcast"
    streams: tuple[str, ...] = ("spatial", "temporal")
    read: int = 2
    factors: tuple[str, ...] = ("spatial_scale", "temporal_scale")
    options: tuple[str, ...] = ("int num_heads", "str t2s_window", "str s2t_window", "float eps")
    outputs: tuple[str, ...] = ("spatial_out", "temporal_out")

    def problem(
        self, streams: Sequence[Tensor], flat: Sequence[Tensor | None], options: tuple[Any, ...], recompute: str,
        compute: torch.dtype,
    ) -> Problem:  # fmt: skip
        temporal, down = streams[1], flat[0]
        assert down is not None
        batch, frames, patches, dim = temporal.shape
        return Problem(
            batch, frames, patches, dim, down.shape[0], options[0], options[1] or None, options[2] or None,
            temporal.dtype, temporal.device.type, None if compute == temporal.dtype else compute,
            gpu=temporal.device.index,
        )  # fmt: skip

    def pack(self, flat: Sequence[Tensor | None]) -> Parameters:
        return Parameters.from_flat(flat)

    def kept(self, kernels: Any, problem: Problem, recompute: str) -> int:
        return kernels.saved_words(problem, recompute)

    def shapes(self, streams: Sequence[Tensor], options: tuple[Any, ...]) -> list[tuple[Tensor, Sequence[int]]]:
        return [(x, x.shape if window else (0,)) for x, window in zip(streams, options[1:3], strict=True)]

    def saved_shape(self, streams: Sequence[Tensor], kept: int) -> tuple[int, ...]:
        return streams[0].shape[0], kept

    def forward(
        self, kernels: Any, call: Call, streams: Sequence[Tensor], parameters: Any, factors: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        recompute = call.recompute if call.kept else ""  # "": nothing is kept
        return kernels.forward(call.problem, *streams, parameters, *factors, call.options[3], recompute)

    def backward(
        self, kernels: Any, call: Call, streams: Sequence[Tensor], parameters: Any, saved: Tensor,
        factors: Sequence[Tensor | None], grads: Sequence[Tensor], wanted: tuple[bool, ...],
    ) -> Sequence[Tensor | None]:  # fmt: skip
        eps, recompute = call.options[3], call.recompute
        return kernels.backward(call.problem, *streams, parameters, saved, *factors, eps, recompute, *grads, wanted)

    def flops(self, streams: Sequence[Any], flat: Sequence[Any], options: tuple[Any, ...]) -> int:
        batch, frames, patches, dim = streams[1]
        heads, t2s, s2t, _ = options
        windows = t2s or None, s2t or None
        return flops(Problem(batch, frames, patches, dim, flat[0][0], heads, *windows, torch.float32, "meta"))

    def backward_flops(
        self, streams: Sequence[Any], flat: Sequence[Any], options: tuple[Any, ...], wanted: Sequence[bool]
    ) -> int:
        """Two products for each of the forward's, by input and by weight, wanted or not."""
        return 2 * self.flops(streams, flat, options)


OPERATOR = _BCast()


def flops(problem: Problem) -> int:
    """Floating-point operations of one forward (two per multiply-add), matrix products only, as torch counts them."""
    tokens, dim, d = problem.batch * problem.frames * problem.patches, problem.dim, problem.bottleneck_dim
    cls = problem.batch * problem.frames
    total = 2 * d * dim * (2 * tokens + cls)
    for window, rows in ((problem.t2s_window, tokens + cls), (problem.s2t_window, tokens)):
        if window is not None:
            length = WINDOWS[window](problem.frames, problem.patches)
            total += 2 * tokens * d * (4 * d + 2 * length) + 2 * rows * d * dim
    return total
