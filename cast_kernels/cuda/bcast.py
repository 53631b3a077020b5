"""Backend `cuda`: B-CAST on a Hopper GPU. One call of the native module makes all launches of a forward or a backward.

This side checks nothing twice: shapes are the op's business, grids and arguments the module's
(csrc/cuda/bcast_draft.cpp). It makes tensors contiguous, allocates results and hands addresses over.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
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
        outputs = _outputs(problem, (spatial, temporal), spatial.dtype)
        words = saved_words(problem, recompute)
        return outputs[0], outputs[1].to(temporal.dtype), spatial.new_empty((problem.batch, words), dtype=torch.float32)
    with common.on_device(spatial):
        given = _Given(problem, (spatial, temporal), parameters, (spatial_scale, temporal_scale))
        multiprocessors = common.multiprocessors(spatial)
        plan = _plan(problem, given.streams, given.dtype, eps, recompute, multiprocessors)
        outputs = _outputs(problem, given.x, given.streams)
        saved = spatial.new_empty((problem.batch, plan.saved_words), dtype=torch.float32)
        scratch = common.memory(spatial, plan.forward_scratch)
        common.kernels().forward(
            plan.native, *given.addresses, [y.data_ptr() for y in outputs], plan.recompute, saved.data_ptr(),
            scratch.data_ptr(), multiprocessors, common.stream(spatial),
        )  # fmt: skip
    return _as(outputs[0], spatial), _as(outputs[1], temporal), saved


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
    primals = [spatial, temporal, *parameters.flat()]
    wants = [want and x is not None for want, x in zip(wanted, primals, strict=True)]
    if problem.batch == 0 or not any(wants) or _exchanges_nothing(problem):
        return [torch.zeros_like(x) if want else None for x, want in zip(primals, wants, strict=True)]  # type: ignore[arg-type]
    with common.on_device(spatial):
        given = _Given(problem, (spatial, temporal), parameters, (spatial_scale, temporal_scale))
        multiprocessors = common.multiprocessors(spatial)
        plan = _plan(problem, given.streams, given.dtype, eps, recompute, multiprocessors)
        received = ((grad_spatial_out, problem.t2s_window), (grad_temporal_out, problem.s2t_window))
        alive, grads_out = common.as_read([g for g, window in received if window is not None], given.streams)
        if len(alive) == 1:
            grads_out.insert(0 if problem.t2s_window is None else 1, 0)
        grads: list[Tensor | None] = [
            torch.empty_like(x) if write and x is not None else None
            for x, write in zip((*given.x, *given.parameters), _written(problem, wants), strict=True)
        ]
        addresses = list(map(common.address, grads))
        (kept,), (saved_address,) = common.as_read([saved], torch.float32)
        scratch = common.memory(spatial, plan.backward_scratch)
        common.kernels().backward(
            plan.native, *given.addresses, grads_out, plan.recompute, saved_address, scratch.data_ptr(), addresses[:2],
            addresses[2:], multiprocessors, common.stream(spatial),
        )  # fmt: skip
        del kept  # alive until here
    return [
        None if x is None or not want else torch.zeros_like(x) if grad is None else _as(grad, x)
        for grad, x, want in zip(grads, primals, wants, strict=True)
    ]


def _exchanges_nothing(problem: Problem) -> bool:
    return problem.t2s_window is None and problem.s2t_window is None


def _as(x: Tensor, like: Tensor) -> Tensor:
    return x if x.dtype == like.dtype else x.to(like.dtype)


def _outputs(problem: Problem, x: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialised outputs, empty for a stream that receives nothing."""
    windows = (problem.t2s_window, problem.s2t_window)
    return [
        one.new_empty((0,) if window is None else one.shape, dtype=dtype)
        for one, window in zip(x, windows, strict=True)
    ]


def _written(problem: Problem, wants: list[bool]) -> list[bool]:
    """Which gradients kernels write: both streams' or none, and all that are wanted but what nothing passed through."""
    written = list(wants)
    written[0] = written[1] = wants[0] or wants[1]
    for stream, window in enumerate((problem.t2s_window, problem.s2t_window)):
        if window is None:  # an up-projection without a branch: its gradient is zero
            up = 2 + 6 * stream + 4
            written[up] = written[up + 1] = False
    return written


class _Given:
    """A call's tensors as kernels read them, kept alive as long as this object, and their addresses.

    Attributes:
        streams: dtype of both streams.
        dtype: of all parameters.
        addresses: of the streams, the parameters and the factors, 0 where one is absent.
    """

    def __init__(
        self, problem: Problem, x: tuple[Tensor, Tensor], parameters: Parameters,
        scale: tuple[Tensor | None, Tensor | None],
    ) -> None:  # fmt: skip
        flat = parameters.flat()
        there = [one for one in flat if one is not None]
        self.streams: torch.dtype = common.dtype_of(x, problem.compute)
        self.dtype: torch.dtype = common.dtype_of(there, problem.compute)
        self.x, of_x = common.as_read(x, self.streams)
        read, of_parameters = common.as_read(there, self.dtype)
        tensors, places = iter(read), iter(of_parameters)
        self.parameters: list[Tensor | None] = [None if one is None else next(tensors) for one in flat]
        self.factors = [None if one is None else common.as_read([one], torch.float32) for one in scale]
        self.addresses: tuple[list[int], list[int], list[int]] = (
            of_x,
            [0 if one is None else next(places) for one in flat],
            [0 if one is None else one[1][0] for one in self.factors],
        )


class _Plan(NamedTuple):
    """What is known of a call but its addresses."""

    native: Any  # the module's Problem
    recompute: int  # as the module numbers it
    saved_words: int  # of a clip
    forward_scratch: int  # bytes
    backward_scratch: int


@lru_cache(maxsize=256)
def _plan(
    problem: Problem, streams: torch.dtype, parameters: torch.dtype, eps: float, recompute: str, multiprocessors: int
) -> _Plan:  # fmt: skip
    kernels = common.kernels()
    native = kernels.Problem(
        problem.batch, problem.frames, problem.patches, problem.dim, problem.bottleneck_dim, problem.num_heads,
        _WINDOW_CODES[problem.t2s_window], _WINDOW_CODES[problem.s2t_window], common.NUMBERS[problem.compute],
        common.NUMBERS[streams], common.NUMBERS[parameters], eps,
    )  # fmt: skip
    code, words = common.RECOMPUTE_CODES[recompute], saved_words(problem, recompute)
    if kernels.saved_bytes(native, code) != problem.batch * words * _WORD:
        raise RuntimeError("csrc/cuda and cast_kernels.cuda.bcast disagree about what forward keeps")
    back = kernels.backward_scratch_bytes(native, code, multiprocessors) if recompute else 0
    return _Plan(native, code, words, kernels.forward_scratch_bytes(native, code), back)


assert set(WINDOWS) == set(_WINDOW_CODES) - {None}
