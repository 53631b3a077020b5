"""The op `bcast`: public function, argument checks, and the registered operator that kernel backends share.

Read from the bottom up for the machinery, from the top down for the use:

    bcast()                         checks the arguments, selects a backend
      -> eager: PyTorch operators, seen through by compilers and autograd
      -> kernels: torch.ops.cast_kernels.bcast (schema, fake, autograd, FLOP formula)
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import cast_kernels.cpu.bcast as cpu_bcast
import cast_kernels.eager.bcast as eager_bcast
import cast_kernels.triton.bcast as triton_bcast
from cast_kernels import attention as attentions
from cast_kernels import backends
from cast_kernels import recompute as levels
from cast_kernels.ops import _derivatives
from cast_kernels.ops._checks import (
    autocast_dtype,
    check_kinds,
    check_parameters,
    check_shape,
    check_tensors,
)
from cast_kernels.problem import DIRECTIONS, EPS, WINDOWS, Direction, Parameters, Problem, Recompute, Stream

#: Backends that run through the registered operator: the module with `forward`, `backward`, `saved_per_clip`.
KERNELS: dict[str, ModuleType] = {"triton": triton_bcast, "cpu": cpu_bcast}


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
        recompute: what backward computes again instead of finding it kept, see :class:`cast_kernels.Recompute`, or
            "auto", a rule of shapes and the GPU's memory (:mod:`cast_kernels.recompute`); kernel backends obey it,
            in `eager` PyTorch keeps what its operators keep.
        backend: "auto", or the one that must run.
        attention: "auto", or "math", matrix products and a softmax, which only backend eager runs: with it the op has
            second and forward-mode derivatives.

    Returns:
        Both streams with their branch added, in the dtype they came in; a stream that receives nothing is
        returned as it came. Under autocast, backends that compute in float32 do so.

    Raises:
        ValueError: a shape, size or device that does not fit, or no value of Recompute.
        TypeError: dtypes that are mixed or not floating.
        BackendError: `backend` cannot run this problem.
        NotImplementedError: a kernel is differentiated twice, or in forward mode.
    """
    levels.check(recompute)
    problem = pose(spatial, temporal, parameters, num_heads, windows, attention)
    recompute = levels.resolve(recompute, problem, temporal.device).value
    spatial_scale = check_scale("spatial_scale", spatial_scale, 1 + problem.patches, spatial)
    temporal_scale = check_scale("temporal_scale", temporal_scale, 1, temporal)
    chosen = backends.select(backend, problem)
    if parameters.t2s is None and parameters.s2t is None:
        return spatial, temporal
    if chosen == "eager":
        return eager_bcast.bcast(problem, spatial, temporal, parameters, spatial_scale, temporal_scale, eps)
    return _run_kernel(chosen, problem, spatial, temporal, parameters, spatial_scale, temporal_scale, eps, recompute)


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

    Whatever is no tensor is a TypeError.
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
    """Raise ValueError unless a table of positions, if there is one, has a row for each token of a window."""
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


def check_scale(name: str, scale: Tensor | None, tokens: int, like: Tensor) -> Tensor | None:
    """The scale as [B, tokens] in float32 or the stream's dtype; [B] means the same factor for every token."""
    if scale is None:
        return None
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
    return scale.reshape(batch, -1).expand(batch, tokens).to(like.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The registered operator. The opaque third output is what the backend keeps for backward, [B, kept], float32; `kept`
# is an argument so that it is part of a compiled graph's identity: a graph that inductor cached on disk for another
# layout of `saved` must not be used. `recompute` is "" where no backward will follow; `compute` is what dense products
# round their operands to bfloat16, as autocast would.
# An absent parameter travels as an empty tensor: torch.library's autograd takes no None inside a list of tensors.

_LIBRARY = torch.library.Library("cast_kernels", "DEF")
_LIBRARY.define(
    "bcast(Tensor spatial, Tensor temporal, Tensor[] parameters, Tensor? spatial_scale, Tensor? temporal_scale, "
    "int num_heads, str t2s_window, str s2t_window, float eps, SymInt kept, str recompute, "
    "ScalarType compute, str backend) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_contiguous_strides,),
)
_LIBRARY.define(
    "bcast_backward(Tensor spatial, Tensor temporal, Tensor[] parameters, Tensor saved, Tensor? spatial_scale, "
    "Tensor? temporal_scale, Tensor grad_spatial_out, Tensor grad_temporal_out, int num_heads, str t2s_window, "
    "str s2t_window, float eps, str recompute, ScalarType compute, bool[] wanted, str backend) -> Tensor[]",
    tags=(torch.Tag.needs_contiguous_strides,),
)


def _run_kernel(
    backend: str,
    problem: Problem,
    spatial: Tensor,
    temporal: Tensor,
    parameters: Parameters,
    spatial_scale: Tensor | None,
    temporal_scale: Tensor | None,
    eps: float,
    recompute: str,
) -> tuple[Tensor, Tensor]:
    """Call the registered operator. Dtypes may be mixed under autocast: kernels take each tensor as it is."""
    absent = spatial.new_empty(0)
    flat = [absent if p is None else p for p in parameters.flat()]
    if not _derivatives.may_be_differentiated((spatial, temporal, *flat)):
        recompute = ""
    kept = KERNELS[backend].saved_per_clip(problem, recompute) if recompute else 0
    spatial_out, temporal_out, _ = torch.ops.cast_kernels.bcast(
        spatial, temporal, flat, spatial_scale, temporal_scale, problem.num_heads, problem.t2s_window or "",
        problem.s2t_window or "", eps, kept, recompute, problem.compute, backend,
    )  # fmt: skip
    return (
        spatial_out if parameters.t2s is not None else spatial,
        temporal_out if parameters.s2t is not None else temporal,
    )


def _present(flat: list[Tensor]) -> Parameters:
    return Parameters.from_flat([p if p.numel() else None for p in flat])


def _problem(temporal: Tensor, flat: list[Tensor], num_heads: int, t2s: str, s2t: str, compute: torch.dtype) -> Problem:
    batch, frames, patches, dim = temporal.shape
    bottleneck = flat[0].shape[0]
    return Problem(
        batch, frames, patches, dim, bottleneck, num_heads, t2s or None, s2t or None,
        temporal.dtype, temporal.device.type, None if compute == temporal.dtype else compute,
    )  # fmt: skip


def _forward(
    spatial: Tensor, temporal: Tensor, parameters: list[Tensor], spatial_scale: Tensor | None,
    temporal_scale: Tensor | None, num_heads: int, t2s_window: str, s2t_window: str, eps: float, kept: int,
    recompute: str, compute: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problem = _problem(temporal, parameters, num_heads, t2s_window, s2t_window, compute)
    return KERNELS[backend].forward(
        problem, spatial, temporal, _present(parameters), spatial_scale, temporal_scale, eps, recompute
    )


def _forward_fake(
    spatial: Tensor, temporal: Tensor, parameters: list[Tensor], spatial_scale: Tensor | None,
    temporal_scale: Tensor | None, num_heads: int, t2s_window: str, s2t_window: str, eps: float, kept: int,
    recompute: str, compute: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        spatial.new_empty(spatial.shape if t2s_window else (0,)),
        temporal.new_empty(temporal.shape if s2t_window else (0,)),
        spatial.new_empty((spatial.shape[0], kept), dtype=torch.float32),
    )


def _backward(
    spatial: Tensor, temporal: Tensor, parameters: list[Tensor], saved: Tensor, spatial_scale: Tensor | None,
    temporal_scale: Tensor | None, grad_spatial_out: Tensor, grad_temporal_out: Tensor, num_heads: int, t2s_window: str,
    s2t_window: str, eps: float, recompute: str, compute: torch.dtype, wanted: list[bool],
    backend: str,
) -> list[Tensor]:  # fmt: skip
    problem = _problem(temporal, parameters, num_heads, t2s_window, s2t_window, compute)
    grads = KERNELS[backend].backward(
        problem, spatial, temporal, _present(parameters), saved, spatial_scale, temporal_scale, eps, recompute,
        grad_spatial_out, grad_temporal_out, tuple(wanted),
    )  # fmt: skip
    primals = [spatial, temporal, *parameters]
    return [grad if grad is not None else x.new_empty((0,)) for grad, x in zip(grads, primals, strict=True)]


def _backward_fake(
    spatial: Tensor, temporal: Tensor, parameters: list[Tensor], saved: Tensor, spatial_scale: Tensor | None,
    temporal_scale: Tensor | None, grad_spatial_out: Tensor, grad_temporal_out: Tensor, num_heads: int, t2s_window: str,
    s2t_window: str, eps: float, recompute: str, compute: torch.dtype, wanted: list[bool],
    backend: str,
) -> list[Tensor]:  # fmt: skip
    primals = [spatial, temporal, *parameters]
    return [x.new_empty(x.shape if want else (0,)) for x, want in zip(primals, wanted, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    spatial, temporal, flat, spatial_scale, temporal_scale, num_heads, t2s, s2t, eps, _, recompute, compute, backend = (
        inputs
    )
    ctx.save_for_backward(spatial, temporal, *flat, spatial_scale, temporal_scale, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.call = (num_heads, t2s, s2t, eps, recompute, compute, backend)
    ctx.wanted = [x.requires_grad for x in (spatial, temporal, *flat)]


def _autograd(ctx: Any, grad_spatial_out: Tensor | None, grad_temporal_out: Tensor | None, _: None) -> tuple[Any, ...]:
    spatial, temporal, *flat, spatial_scale, temporal_scale, saved = ctx.saved_tensors
    num_heads, t2s, s2t, eps, recompute, compute, backend = ctx.call
    # The kernels read a gradient of each stream that received something, also where nobody used the output.
    if grad_spatial_out is None:
        grad_spatial_out = spatial.new_zeros(spatial.shape if t2s else (0,))
    if grad_temporal_out is None:
        grad_temporal_out = temporal.new_zeros(temporal.shape if s2t else (0,))
    grads = torch.ops.cast_kernels.bcast_backward(
        spatial, temporal, flat, saved, spatial_scale, temporal_scale, grad_spatial_out, grad_temporal_out, num_heads,
        t2s, s2t, eps, recompute, compute, ctx.wanted, backend,
    )  # fmt: skip
    kept = [grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True)]
    return kept[0], kept[1], kept[2:], *(None,) * 10


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("bcast", _forward, _key)
    _LIBRARY.impl("bcast_backward", _backward, _key)
torch.library.register_fake("cast_kernels::bcast", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("cast_kernels::bcast_backward", _backward_fake, lib=_LIBRARY)
_derivatives.register(_LIBRARY, "bcast", _setup_context, _autograd)


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


def _shaped_problem(spatial: Any, temporal: Any, parameters: Any, num_heads: int, t2s: str, s2t: str) -> Problem:
    batch, frames, patches, dim = temporal
    bottleneck = parameters[0][0]
    windows = (t2s or None, s2t or None)
    return Problem(batch, frames, patches, dim, bottleneck, num_heads, *windows, torch.float32, "meta")


@register_flop_formula(torch.ops.cast_kernels.bcast)
def _forward_flops(
    spatial: Any, temporal: Any, parameters: Any, spatial_scale: Any, temporal_scale: Any, num_heads: int, t2s: str,
    s2t: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return flops(_shaped_problem(spatial, temporal, parameters, num_heads, t2s, s2t))


@register_flop_formula(torch.ops.cast_kernels.bcast_backward)
def _backward_flops(
    spatial: Any, temporal: Any, parameters: Any, saved: Any, spatial_scale: Any, temporal_scale: Any,
    grad_spatial_out: Any, grad_temporal_out: Any, num_heads: int, t2s: str, s2t: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Two products for each of the forward's, by input and by weight; what attention recomputes is not counted."""
    return 2 * flops(_shaped_problem(spatial, temporal, parameters, num_heads, t2s, s2t))
