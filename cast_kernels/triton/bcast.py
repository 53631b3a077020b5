"""Backend `triton`: B-CAST on a GPU in two launches forward, each for both streams.

    project  ->  exchange

and back through `exchange_backward`, `attention_backward`, `project_backward`, one launch for all weight gradients and
small fixed-order sums for the vectors. This file owns memory and launches; the kernels lie beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cast_kernels.problem import Parameters, Problem, Recompute, Verdict
from cast_kernels.triton.common import on_device, verdict

if TYPE_CHECKING:
    from cast_kernels.triton.bcast_call import Call

#: Head dimensions that the attention's tiles take: a tensor core contracts 16 at a time.
HEAD_DIMS = (16, 32, 64)
#: Widest bottleneck: a row of it must fit in a program's registers.
MOST_CHANNELS = 768
#: Parts of `saved` begin at multiples of 128 bytes, a cache line: 32 words of 4 bytes.
_LINE = 32


def can_run(problem: Problem) -> Verdict:
    """Whether Triton can run the problem here, and the reason in words either way."""
    if problem.attention != "auto":
        return Verdict(False, f"attention={problem.attention!r} was asked for; the kernels attend themselves")
    if problem.bottleneck_dim > MOST_CHANNELS or problem.bottleneck_dim % 16:
        return Verdict(
            False, f"the bottleneck has {problem.bottleneck_dim} channels; a multiple of 16 up to {MOST_CHANNELS} fits"
        )
    if problem.head_dim not in HEAD_DIMS:
        return Verdict(False, f"heads have {problem.head_dim} channels; {', '.join(map(str, HEAD_DIMS))} are possible")
    if problem.dim % 16:
        return Verdict(False, f"the streams have {problem.dim} channels; a multiple of 16 is needed")
    return verdict(problem.device, problem.dtype, problem.compute)


def _parts(problem: Problem, recompute: str) -> dict[str, tuple[int, torch.dtype]]:
    """What forward keeps: name -> (elements of one clip, dtype)."""
    if recompute in ("", Recompute.ALL):
        return {}
    tokens, d, compute = problem.frames * problem.patches, problem.bottleneck_dim, problem.compute
    parts = {"spatial_z": ((tokens + problem.frames) * d, compute), "temporal_z": (tokens * d, compute)}
    for name, window in (("t2s", problem.t2s_window), ("s2t", problem.s2t_window)):
        if window is None:
            continue
        parts |= {f"{name}_o": (tokens * d, compute), f"{name}_lse": (tokens * problem.num_heads, torch.float32)}
        if recompute == Recompute.NOTHING:
            rows = tokens + (problem.frames if name == "t2s" else 0)
            parts |= {f"{name}_q": (tokens * d, compute), f"{name}_kv": (tokens * 2 * d, compute)}
            parts |= {f"{name}_h": (rows * d, compute)}
    return parts


def _words(elements: int, dtype: torch.dtype) -> int:
    """4-byte words of a part, rounded up to a line."""
    return (elements * dtype.itemsize + 4 * _LINE - 1) // (4 * _LINE) * _LINE


def saved_per_clip(problem: Problem, recompute: str) -> int:
    """4-byte words that forward keeps of one clip. Sizes may be symbolic."""
    return sum(_words(*part) for part in _parts(problem, recompute).values())


def _carve(problem: Problem, recompute: str, saved: Tensor) -> dict[str, Tensor]:
    """Names -> flat views into `saved` [B, saved_per_clip]."""
    flat, start, views = saved.view(-1), 0, {}
    for name, (elements, dtype) in _parts(problem, recompute).items():
        words = problem.batch * _words(elements, dtype)
        views[name] = flat[start : start + words].view(dtype)[: problem.batch * elements]
        start += words
    return views


def forward(
    problem: Problem,
    spatial: Tensor,
    temporal: Tensor,
    parameters: Parameters,
    spatial_scale: Tensor | None,
    temporal_scale: Tensor | None,
    eps: float,
    recompute: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both streams with their branch added, and what backward needs.

    Args:
        problem: the sizes and the compute dtype.
        spatial: [B, T, 1+N, D], any strides.
        temporal: [B, T, N, D].
        parameters: as :class:`~cast_kernels.problem.Parameters` describes, in any floating dtype.
        spatial_scale: [B, 1+N], multiplies the spatial branch, or None.
        temporal_scale: [B, 1], multiplies the temporal branch, or None.
        eps: LayerNorm epsilon.
        recompute: a value of :class:`~cast_kernels.problem.Recompute`, or "" where no backward will follow.

    Returns:
        The streams' outputs in their dtypes (empty for a stream that receives nothing) and `saved`
        [B, saved_per_clip], float32 words that hold parts of several dtypes.
    """
    from cast_kernels.triton.bcast_call import Call

    saved = spatial.new_empty((problem.batch, saved_per_clip(problem, recompute)), dtype=torch.float32)
    outputs = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if window is not None else x.new_empty((0,))
        for x, window in ((spatial, problem.t2s_window), (temporal, problem.s2t_window))
    ]
    if problem.batch:
        with on_device(spatial):
            call = Call(problem, spatial, temporal, parameters, spatial_scale, temporal_scale, eps)
            parts = _carve(problem, recompute, saved)
            call.project(parts)
            call.exchange(parts, {"spatial": outputs[0], "temporal": outputs[1]})
    return outputs[0], outputs[1], saved


def backward(
    problem: Problem,
    spatial: Tensor,
    temporal: Tensor,
    parameters: Parameters,
    saved: Tensor,
    spatial_scale: Tensor | None,
    temporal_scale: Tensor | None,
    eps: float,
    recompute: str,
    grad_spatial_out: Tensor,
    grad_temporal_out: Tensor,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of the two inputs and the 28 parameters in their dtypes, None where not wanted.

    Args:
        saved: what :func:`forward` returned with the same `recompute`.
        grad_spatial_out: [B, T, 1+N, D]; not read if the spatial stream received nothing.
        grad_temporal_out: [B, T, N, D]; not read if the temporal stream received nothing.
        wanted: for the inputs and each of :data:`~cast_kernels.problem.PARAMETER_NAMES`, whether to compute it.

    The other arguments are those of :func:`forward`.
    """
    from cast_kernels.triton.bcast_call import Call

    primals = [spatial, temporal, *parameters.flat()]
    if problem.batch == 0:
        return [
            torch.zeros_like(x) if want and x is not None else None for x, want in zip(primals, wanted, strict=True)
        ]
    with on_device(spatial):
        call = Call(problem, spatial, temporal, parameters, spatial_scale, temporal_scale, eps)
        parts = _carve(problem, recompute, saved)
        _recompute(call, parts, recompute)
        grads = call.gradients(parts, {"spatial": grad_spatial_out, "temporal": grad_temporal_out}, wanted)
    return [
        None if g is None or x is None or not want else g.to(x.dtype)
        for g, x, want in zip(grads, primals, wanted, strict=True)
    ]


def _recompute(call: Call, parts: dict[str, Tensor], recompute: str) -> None:
    """Complete `parts` by what backward reads: the same kernels on the same inputs."""
    if recompute == Recompute.NOTHING:
        return
    call.project(parts, from_z=recompute == Recompute.CHEAP)
    if recompute == Recompute.ALL:
        call.exchange(parts, None)
