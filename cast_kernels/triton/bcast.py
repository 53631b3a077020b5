"""Backend `triton`: B-CAST on a GPU in two launches forward, each for both streams.

    project  ->  exchange

and back through `exchange_backward`, `attention_backward`, `project_backward`, one launch for all weight gradients and
small fixed-order sums for the vectors. This file hands tensors to plans, which own launches; the kernels lie beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from cast_kernels.problem import Direction, Parameters, Problem, Verdict
from cast_kernels.triton.common import on_device, verdict

if TYPE_CHECKING:
    from cast_kernels.triton.bcast_plan import Kind

#: Head dimensions that the attention's tiles take: a tensor core contracts 16 at a time.
HEAD_DIMS = (16, 32, 64)
#: Widest bottleneck: a row of it must fit in a program's registers.
MOST_CHANNELS = 768
_DTYPE = attrgetter("dtype")
#: A tensor, or one that may be absent.
AnyTensor = TypeVar("AnyTensor", Tensor, Tensor | None)


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
    return verdict(problem.device, problem.gpu, problem.dtype, problem.compute)


def saved_words(problem: Problem, recompute: str) -> int:
    """4-byte words that forward keeps of one clip. Sizes may be symbolic."""
    from cast_kernels.triton.bcast_plan import kept

    return sum(part.words for part in kept(problem, recompute))


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
        [B, saved_words], float32 words that hold parts of several dtypes.
    """
    from cast_kernels.triton.bcast_plan import forward_plan

    streams, received = (spatial, temporal), (problem.t2s_window, problem.s2t_window)
    outputs = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if window is not None else x.new_empty((0,))
        for x, window in zip(streams, received, strict=True)
    ]
    if problem.batch == 0:
        return outputs[0], outputs[1], spatial.new_empty((0, saved_words(problem, recompute)), dtype=torch.float32)
    with on_device(spatial):
        kind, given, _ = _operands(problem, streams, parameters, (spatial_scale, temporal_scale), eps, recompute)
        plan = forward_plan(problem, kind)
        saved = spatial.new_empty(plan.saved_shape, dtype=torch.float32)
        inputs = len(given)
        given += [y for y, window in zip(outputs, received, strict=True) if window is not None]
        plan.run(given, saved, inputs)
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
    from cast_kernels.triton.bcast_backward_plan import backward_plan
    from cast_kernels.triton.launch import aligned

    primals = [spatial, temporal, *parameters.flat()]
    wanted = tuple(want and x is not None for want, x in zip(wanted, primals, strict=True))
    if problem.batch == 0 or not any(wanted):
        return [torch.zeros_like(x) if want else None for x, want in zip(primals, wanted, strict=True)]  # type: ignore[arg-type]
    with on_device(spatial):
        kind, given, alike = _operands(
            problem, (spatial, temporal), parameters, (spatial_scale, temporal_scale), eps, recompute, wanted
        )
        plan, written = backward_plan(problem, kind)
        received = ((grad_spatial_out, problem.t2s_window), (grad_temporal_out, problem.s2t_window))
        given += [grad.to(kind.streams).contiguous() for grad, window in received if window is not None]
        inputs = len(given)
        grads: list[Tensor | None] = [None] * len(primals)
        for i in written:
            grad = grads[i] = torch.empty_like(alike[i])
            given.append(grad)
        plan.run(given, aligned(saved), inputs)
    return [
        None if x is None or not want else _as(grad, x) for grad, x, want in zip(grads, primals, wanted, strict=True)
    ]


def _as(grad: Tensor | None, x: Tensor) -> Tensor:
    """The gradient in the dtype of x; zero where nothing that was computed depends on x."""
    return torch.zeros_like(x) if grad is None else grad if grad.dtype == x.dtype else grad.to(x.dtype)


def _operands(
    problem: Problem, streams: tuple[Tensor, Tensor], parameters: Parameters,
    scales: tuple[Tensor | None, Tensor | None], eps: float, recompute: str, wanted: tuple[bool, ...] = (),
) -> tuple[Kind, list[Tensor], list[Any]]:  # fmt: skip
    """What the plan is of; the tensors that both plans are given first; and streams and parameters.

    One kernel serves both streams, so what autocast lets differ is widened to one dtype: exact, and rare.
    """
    from cast_kernels.triton.bcast_plan import Kind

    alike: Sequence[Tensor] = _alike(streams)
    flat: Sequence[Any] = _alike(_with_tables(problem, parameters).flat())
    present = tuple(x is not None for x in flat)
    kind = Kind(
        alike[0].dtype, flat[0].dtype, (streams[0].dtype, streams[1].dtype), present,
        (scales[0] is not None, scales[1] is not None), eps, recompute, wanted,
    )  # fmt: skip
    given = [*alike, *(x for x in flat if x is not None)]
    given += [s.float().contiguous() for s in scales if s is not None]
    return kind, given, [*alike, *flat]


def _with_tables(problem: Problem, parameters: Parameters) -> Parameters:
    """With zeros for a table that is missing beside others: kernels add all of them or none."""
    directions = [way for way in (parameters.t2s, parameters.s2t) if way is not None]
    missing = {table is None for way in directions for table in (way.q_pos, way.kv_pos)}
    if len(missing) == 1:
        return parameters
    from cast_kernels.triton.bcast_plan import ways

    made = {}
    for name, way in ways(problem).items():
        direction: Direction = getattr(parameters, name)
        tables = {
            "q_pos": _table(direction.q_pos, way.asking_length, direction.q_bias),
            "kv_pos": _table(direction.kv_pos, way.answering_length, direction.q_bias),
        }
        made[name] = direction._replace(**tables)
    return parameters._replace(**made)  # type: ignore[arg-type]


def _table(table: Tensor | None, length: int, like: Tensor) -> Tensor:
    return like.new_zeros(length, like.numel()) if table is None else table


def _alike(tensors: Sequence[AnyTensor]) -> Sequence[AnyTensor]:
    """The tensors contiguous and in one dtype that holds each one's values; mostly they are."""
    there = [x for x in tensors if x is not None]
    dtypes = set(map(_DTYPE, there))
    if len(dtypes) == 1 and all(map(Tensor.is_contiguous, there)):
        return tensors
    dtype = reduce(torch.promote_types, dtypes)
    return [x if x is None else x.to(dtype).contiguous() for x in tensors]
