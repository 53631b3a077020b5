"""Backend `cpu`: B-CAST in native C++, float32, forward and backward.

This side checks nothing twice: shapes are the op's business, pointers and scratch memory the core's. It
only makes tensors contiguous, allocates results and hands addresses over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cast_kernels import _native
from cast_kernels.cpu.common import Addresses, verdict
from cast_kernels.problem import Parameters, Problem, Verdict

_WINDOW_CODES = {None: -1, "time": 0, "space": 1, "space-time": 2}


def can_run(problem: Problem) -> Verdict:
    """Whether the native core can run the problem, and the reason in words either way.

    Raises:
        ValueError: CAST_KERNELS_CPU_ISA names no instruction-set level.
    """
    return verdict(problem.device, problem.dtype, problem.autocast)


def saved_per_clip(problem: Problem) -> int:
    """Floats that backward needs of one clip; `csrc/cpu/problem.h` lays them out. Sizes may be symbolic."""
    directions = [problem.t2s_window is not None, problem.s2t_window is not None]
    if not any(directions):
        return 0
    tokens, d = problem.frames * problem.patches, problem.bottleneck_dim
    rows = (tokens + problem.frames, tokens)
    floats = 16 * d + 64
    for present, own_rows in zip(directions, rows, strict=True):
        floats += own_rows * d + own_rows
        if present:
            floats += 4 * tokens * d + 2 * tokens * problem.num_heads + own_rows * d
    return floats


def forward(
    problem: Problem,
    spatial: Tensor,
    temporal: Tensor,
    parameters: Parameters,
    spatial_scale: Tensor | None,
    temporal_scale: Tensor | None,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both streams with their branch added, and what backward needs.

    Args:
        problem: the sizes, float32 on the CPU.
        spatial: [B, T, 1+N, D], any strides, as are all tensors here.
        temporal: [B, T, N, D].
        parameters: as :class:`~cast_kernels.problem.Parameters` describes.
        spatial_scale: [B, 1+N], multiplies the spatial branch, or None.
        temporal_scale: [B, 1], multiplies the temporal branch, or None.
        eps: LayerNorm epsilon.
        save: whether backward will follow.

    Returns:
        The streams' outputs (empty for a stream that receives nothing) and `saved` [B, saved_per_clip] (or [B, 0]).
    """
    core = _native.core()
    inputs = Addresses()
    spatial_out = torch.empty(spatial.shape if problem.t2s_window is not None else (0,))
    temporal_out = torch.empty(temporal.shape if problem.s2t_window is not None else (0,))
    saved = torch.empty((problem.batch, saved_per_clip(problem) if save else 0))
    core.bcast_forward(
        _native_problem(core, problem, eps), inputs(spatial), inputs(temporal), inputs(spatial_scale),
        inputs(temporal_scale), [inputs(p) for p in parameters.flat()], spatial_out.data_ptr(),
        temporal_out.data_ptr(), saved.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return spatial_out, temporal_out, saved


def backward(
    problem: Problem,
    spatial: Tensor,
    temporal: Tensor,
    parameters: Parameters,
    saved: Tensor,
    spatial_scale: Tensor | None,
    temporal_scale: Tensor | None,
    eps: float,
    grad_spatial_out: Tensor,
    grad_temporal_out: Tensor,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of the two inputs and the 28 parameters, None where not wanted.

    Args:
        saved: what :func:`forward` returned with `save`.
        grad_spatial_out: [B, T, 1+N, D]; not read if the spatial stream received nothing.
        grad_temporal_out: [B, T, N, D]; not read if the temporal stream received nothing.
        wanted: for the inputs and each of :data:`~cast_kernels.problem.PARAMETER_NAMES`, whether to compute it.

    The other arguments are those of :func:`forward`.
    """
    core = _native.core()
    inputs = Addresses()
    directions = (problem.t2s_window is not None, problem.s2t_window is not None)
    flat = parameters.flat()
    # An empty batch, or an up-projection that nothing passed through: no kernel writes these, their gradient is zero.
    unwritten = {4, 5} if not directions[0] else set()
    unwritten |= {10, 11} if not directions[1] else set()
    grads = [
        (torch.zeros if problem.batch == 0 or i - 2 in unwritten else torch.empty)(x.shape)
        if want and x is not None
        else None
        for i, (x, want) in enumerate(zip([spatial, temporal, *flat], wanted, strict=True))
    ]
    addresses = [0 if g is None else g.data_ptr() for g in grads]
    core.bcast_backward(
        _native_problem(core, problem, eps), inputs(spatial), inputs(temporal), inputs(spatial_scale),
        inputs(temporal_scale), [inputs(p) for p in flat], inputs(saved),
        inputs(grad_spatial_out if directions[0] else None), inputs(grad_temporal_out if directions[1] else None),
        addresses[0], addresses[1], addresses[2:], torch.get_num_threads(),
    )  # fmt: skip
    return grads


def _native_problem(core: Any, problem: Problem, eps: float) -> Any:
    native = core.Problem(
        problem.batch, problem.frames, problem.patches, problem.dim, problem.bottleneck_dim, problem.num_heads,
        _WINDOW_CODES[problem.t2s_window], _WINDOW_CODES[problem.s2t_window], eps,
    )  # fmt: skip
    assert core.saved_per_clip(native) == saved_per_clip(problem), "the two sides disagree about `saved`"
    return native
