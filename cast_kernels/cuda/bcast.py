"""Backend `cuda`: B-CAST on a Hopper GPU. One call of the native module makes all launches of a forward or a backward.

This side checks nothing twice: shapes are the op's business, grids and arguments the module's
(csrc/cuda/bcast_draft.cpp). It makes tensors contiguous, allocates results and hands addresses over.
"""

from __future__ import annotations

from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cast_kernels.cuda import common
from cast_kernels.problem import WINDOWS, Parameters, Problem, Recompute, Verdict

#: Widths of the bottleneck that the row kernels are compiled for.
BOTTLENECKS = (192, 384)
HEAD_DIMS = (16, 32, 64)
#: A row's bytes are a multiple of 16 in every dtype, as the copies of the tensor memory accelerator ask.
DIM_MULTIPLE = 8
_WINDOW_CODES = {None: -1, "time": 0, "space": 1, "space-time": 2}
_LINE = 128  # bytes of a cache line
_WORD = 4
#: Tensors that may be absent.
Maybe = tuple[Tensor | None, ...]


def can_run(problem: Problem) -> Verdict:
    """Whether the CUDA kernels can run the problem here, and the reason in words either way."""
    if problem.device == "cuda" and (other := common.other_gpu(problem.gpu)):
        return Verdict(False, other)
    if problem.attention != "auto":
        return Verdict(False, f"attention={problem.attention!r} was asked for; the kernels attend themselves")
    if problem.bottleneck_dim not in BOTTLENECKS:
        fit = " and ".join(map(str, BOTTLENECKS))
        return Verdict(False, f"the bottleneck has {problem.bottleneck_dim} channels; {fit} are possible")
    if problem.head_dim not in HEAD_DIMS:
        made, fit = f"{problem.bottleneck_dim} in {problem.num_heads} heads", ", ".join(map(str, HEAD_DIMS))
        return Verdict(False, f"heads have {problem.head_dim} channels, {made}; {fit} are possible")
    if problem.frames < 1 or problem.patches < 1:
        return Verdict(False, f"a clip has {problem.frames} frames of {problem.patches} patches; one each is needed")
    if problem.dim % DIM_MULTIPLE:
        return Verdict(False, f"the streams have {problem.dim} channels; a multiple of {DIM_MULTIPLE} is needed")
    return common.verdict(problem.device, problem.dtype, problem.compute)


def saved_words(problem: Problem, recompute: str) -> int:
    """4-byte words that forward keeps of one clip; csrc/cuda/bcast_draft.cpp lays them out. Sizes may be symbolic."""
    if recompute in ("", Recompute.ALL) or (problem.t2s_window, problem.s2t_window) == (None, None):
        return 0
    d, narrow = problem.bottleneck_dim, problem.compute.itemsize
    patches = problem.frames * problem.patches
    rows = (patches + problem.frames, patches)  # of a clip: spatial, temporal
    parts = []  # bytes of a clip
    for own in rows:
        parts += [own * d * narrow, own * 4]  # xhat, rstd
    for way, window in enumerate((problem.t2s_window, problem.s2t_window)):
        if window is None:
            continue
        asking, answering = rows[way], rows[1 - way]
        parts += [asking * d * narrow, asking * problem.num_heads * 4]  # O, log-sum-exp
        if recompute == Recompute.NOTHING:
            parts += [asking * d * narrow, answering * 2 * d * narrow, asking * d * narrow]  # Q, K and V, h
    return sum((part + _LINE - 1) // _LINE * (_LINE // _WORD) for part in parts)


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

    Raises:
        RuntimeError: the driver refuses a launch; in its words.
    """
    if problem.batch == 0 or _exchanges_nothing(problem):
        words = saved_words(problem, recompute)
        y, z = _outputs(problem, (spatial, temporal))
        return y, z, spatial.new_empty((problem.batch, words), dtype=torch.float32)
    with common.on_device(spatial):
        factors = _factors(spatial_scale, temporal_scale)
        found = _forward(problem, (spatial, temporal), parameters, factors, eps, recompute)
        if found is not None:
            return found
        x = common.together((spatial, temporal), problem.compute)
        parameters = Parameters.from_flat(common.together(parameters.flat(), problem.compute))
        y, z, saved = common.must(_forward(problem, x, parameters, factors, eps, recompute))
        return _as(y, spatial), _as(z, temporal), saved


def _forward(
    problem: Problem, x: tuple[Tensor, ...], parameters: Parameters, factors: Maybe, eps: float, recompute: str
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """The outputs and what is kept; None if a tensor is not what kernels read."""
    first = x[0]
    plan = _plan_for(problem, first, parameters, eps, recompute)
    y = _outputs(problem, x)
    saved = torch.empty_strided(
        (problem.batch, plan.saved_words), (plan.saved_words, 1), dtype=torch.float32, device=first.device
    )
    scratch = common.memory(first, plan.forward_scratch)
    if not plan.native.forward(x, parameters, factors, y, saved, scratch, common.stream(first)):
        return None
    return *y, saved


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

    Raises:
        RuntimeError: the driver refuses a launch; in its words.
    """
    places = _places(problem, tuple(wanted), common.kernels().present(parameters))
    if problem.batch == 0 or not places.written or _exchanges_nothing(problem):
        return _returned((None,) * len(places.wants), places, spatial, temporal, parameters)
    with common.on_device(spatial):
        factors = _factors(spatial_scale, temporal_scale)
        grad_y: Maybe = (
            None if problem.t2s_window is None else grad_spatial_out,
            None if problem.s2t_window is None else grad_temporal_out,
        )
        grads = _backward(problem, places, (spatial, temporal), parameters, factors, eps, recompute, saved, grad_y)
        if grads is not None and places.complete:
            return list(grads)
        if grads is None:
            x = common.together((spatial, temporal), problem.compute)
            read = Parameters.from_flat(common.together(parameters.flat(), problem.compute))
            grad_y = tuple(common.readable(g, x[0].dtype) for g in grad_y)
            saved = common.readable(saved, torch.float32)
            grads = common.must(_backward(problem, places, x, read, factors, eps, recompute, saved, grad_y))
        return _returned(grads, places, spatial, temporal, parameters)


def _returned(
    grads: Maybe, places: _Places, spatial: Tensor, temporal: Tensor, parameters: Parameters
) -> list[Tensor | None]:
    """What is wanted of the gradients in the dtypes of what they are of; zeros where kernels write none."""
    primals = [spatial, temporal, *parameters.flat()]
    return [
        None if x is None or not want else torch.zeros_like(x) if grad is None else _as(grad, x)
        for grad, x, want in zip(grads, primals, places.wants, strict=True)
    ]


def _backward(
    problem: Problem, places: _Places, x: tuple[Tensor, ...], parameters: Parameters,
    factors: Maybe, eps: float, recompute: str, saved: Tensor, grad_y: Maybe,
) -> Maybe | None:  # fmt: skip
    """What kernels write of the gradients; None if a tensor is not what kernels read.

    Those of parameters whose rows are equally wide lie in one allocation, which lives as long as any of them.
    """
    first = x[0]
    plan = _plan_for(problem, first, parameters, eps, recompute)
    made: list[Tensor | None] = [None]
    if places.of_x:
        made += map(torch.empty_like, x)
    owner = parameters.spatial.down_weight
    for shape, rows in places.groups:
        made += owner.new_empty(shape).split_with_sizes(rows)
    grads: Maybe = places.order(made)
    scratch = common.memory(first, plan.backward_scratch)
    fits = plan.native.backward(x, parameters, factors, grad_y, saved, scratch, grads, common.stream(first))
    return grads if fits else None


def _exchanges_nothing(problem: Problem) -> bool:
    return problem.t2s_window is None and problem.s2t_window is None


def _as(x: Tensor, like: Tensor) -> Tensor:
    return x if x.dtype == like.dtype else x.to(like.dtype)


def _outputs(problem: Problem, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Uninitialised outputs, empty for a stream that receives nothing."""
    return (
        x[0].new_empty(0) if problem.t2s_window is None else torch.empty_like(x[0]),
        x[1].new_empty(0) if problem.s2t_window is None else torch.empty_like(x[1]),
    )


def _factors(spatial: Tensor | None, temporal: Tensor | None) -> Maybe:
    """Drop-path's factors, which come in the dtype of their stream, as kernels read them."""
    if spatial is None and temporal is None:
        return None, None
    return common.readable(spatial, torch.float32), common.readable(temporal, torch.float32)


class _Places(NamedTuple):
    """Which gradients there are, and where :func:`_backward` finds them."""

    wants: list[bool]  # for the streams and each parameter: whether its gradient is wanted
    written: bool  # whether kernels write any
    of_x: bool  # whether they write the streams'
    groups: list[tuple[tuple[int, ...], list[int]]]  # of parameters: the shape of all together, and rows of each
    order: Any  # picks all gradients out of: None, the streams', those of each group
    complete: bool  # whether what kernels write is what is wanted


@lru_cache(maxsize=256)
def _places(problem: Problem, wanted: tuple[bool, ...], present: int) -> _Places:
    """
    Args:
        wanted: for the streams and each parameter.
        present: a bit for each parameter.
    """
    wants = [want and (i < 2 or bool(present >> i - 2 & 1)) for i, want in enumerate(wanted)]
    written = _written(problem, wants)
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # a row's shape -> numbers and rows
    for number, (rows, *row) in enumerate(_shapes(problem)):
        if written[2 + number]:
            groups.setdefault(tuple(row), []).append((number, rows))
    made = [None, *((0, 1) if written[0] else ()), *(2 + number for own in groups.values() for number, _ in own)]
    places = [made.index(i) if write else 0 for i, write in enumerate(written)]
    shapes = [((sum(rows for _, rows in own), *row), [rows for _, rows in own]) for row, own in groups.items()]
    return _Places(wants, any(written), written[0], shapes, itemgetter(*places), written == wants)


def _shapes(problem: Problem) -> list[tuple[int, ...]]:
    """Of all parameters that there may be."""
    d, dim = problem.bottleneck_dim, problem.dim
    stream = [(d, dim), (d,), (d,), (d,), (dim, d), (dim,)]
    way = [(d, d), (d,), (2 * d, d), (2 * d,), (d, d), (d,)]
    lengths = [
        WINDOWS[window](problem.frames, problem.patches) if window else 0
        for window in (problem.t2s_window, problem.s2t_window)
    ]
    return [*stream, *stream, *(shape for length in lengths for shape in ((length, d), (length, d), *way))]


def _written(problem: Problem, wants: list[bool]) -> list[bool]:
    """Which gradients kernels write: both streams' or none, and all that are wanted but what nothing passed through."""
    written = list(wants)
    written[0] = written[1] = wants[0] or wants[1]
    for stream, window in enumerate((problem.t2s_window, problem.s2t_window)):
        if window is None:  # an up-projection without a branch: its gradient is zero
            up = 2 + 6 * stream + 4
            written[up] = written[up + 1] = False
    return written


class _Plan(NamedTuple):
    """What is known of a call but its tensors."""

    native: Any  # the module's Plan
    saved_words: int  # of a clip
    forward_scratch: int  # bytes
    backward_scratch: int


def _plan_for(problem: Problem, first: Tensor, parameters: Parameters, eps: float, recompute: str) -> _Plan:
    """The plan if all streams are of the dtype of the first, and all parameters of that of theirs."""
    return _plan(problem, first.dtype, parameters.spatial.down_weight.dtype, eps, recompute, first.get_device())


@lru_cache(maxsize=256)
def _plan(
    problem: Problem, streams: torch.dtype, parameters: torch.dtype, eps: float, recompute: str, gpu: int
) -> _Plan:  # fmt: skip
    kernels, multiprocessors = common.kernels(), common.multiprocessors(gpu)
    numbers = [common.NUMBERS[common.read_as(dtype, problem.compute)] for dtype in (streams, parameters)]
    native = kernels.Problem(
        problem.batch, problem.frames, problem.patches, problem.dim, problem.bottleneck_dim, problem.num_heads,
        _WINDOW_CODES[problem.t2s_window], _WINDOW_CODES[problem.s2t_window], common.NUMBERS[problem.compute],
        *numbers, eps,
    )  # fmt: skip
    code, words = common.RECOMPUTE_CODES[recompute], saved_words(problem, recompute)
    if kernels.saved_bytes(native, code) != problem.batch * words * _WORD:
        raise RuntimeError("csrc/cuda and cast_kernels.cuda.bcast disagree about what forward keeps")
    back = kernels.backward_scratch_bytes(native, code, multiprocessors) if recompute else 0
    plan = kernels.Plan(native, code, multiprocessors)
    return _Plan(plan, words, kernels.forward_scratch_bytes(native, code), back)


assert set(WINDOWS) == set(_WINDOW_CODES) - {None}
