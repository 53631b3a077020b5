"""Backend `cpu`: B-CAST in native C++, forward and backward, computing in float32.

The op checks shapes, the core checks pointers and allocates scratch memory. This file makes tensors contiguous and
float32, allocates results and passes addresses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cast_kernels import _native
from cast_kernels.cpu.common import RECOMPUTE_CODES, Addresses, float32, verdict, zeros
from cast_kernels.problem import Parameters, Problem, Recompute, Verdict

_WINDOW_CODES = {None: -1, "time": 0, "space": 1, "space-time": 2}


def can_run(problem: Problem) -> Verdict:
    """Whether the native core can run the problem, and why or why not.

    Raises:
        ValueError: CAST_KERNELS_CPU_ISA names no instruction-set level.
    """
    if problem.attention != "auto":
        return Verdict(False, f"attention={problem.attention!r} was asked for; the native core attends itself")
    return verdict(problem.device, problem.dtype, problem.autocast)


def saved_words(problem: Problem, recompute: str) -> int:
    """Floats that forward keeps of one clip; `csrc/cpu/clip.h` lays them out. Sizes may be symbolic."""
    windows = (problem.t2s_window, problem.s2t_window)
    if windows == (None, None) or recompute == Recompute.ALL:
        return 0
    everything = recompute == Recompute.NOTHING
    tokens, d = problem.frames * problem.patches, problem.bottleneck_dim
    rows = (tokens + problem.frames, tokens)
    floats = 16 * d + 64
    for window, own_rows in zip(windows, rows, strict=True):
        floats += own_rows * d + own_rows
        if window is not None:
            floats += 2 * tokens * problem.num_heads + own_rows * d + (4 * tokens * d if everything else 0)
    return floats


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
    """Both streams with their branch added, and `saved` for backward.

    Args:
        problem: the sizes, on the CPU.
        spatial: [B, T, 1+N, D], any strides, float32 or bfloat16, as are all tensors here.
        temporal: [B, T, N, D].
        parameters: as :class:`~cast_kernels.problem.Parameters` describes.
        spatial_scale: [B, 1+N], multiplies the spatial branch, or None.
        temporal_scale: [B, 1], multiplies the temporal branch, or None.
        eps: LayerNorm epsilon.
        recompute: a value of :class:`~cast_kernels.problem.Recompute`, or "" if no backward will follow.

    Returns:
        The streams' outputs in their dtypes (empty for a stream that receives nothing) and `saved`
        [B, saved_words], float32.
    """
    core = _native.core()
    native = _native_problem(core, problem, eps, recompute or "all")
    alive = Addresses()
    spatial_out = float32(spatial.shape if problem.t2s_window is not None else (0,))
    temporal_out = float32(temporal.shape if problem.s2t_window is not None else (0,))
    saved = float32((problem.batch, saved_words(problem, recompute or "all")))
    core.bcast_forward(
        native, alive(spatial), alive(temporal), alive(spatial_scale),
        alive(temporal_scale), [alive(p) for p in parameters.flat()], spatial_out.data_ptr(), temporal_out.data_ptr(),
        saved.data_ptr(), RECOMPUTE_CODES[recompute or "all"], torch.get_num_threads(),
    )  # fmt: skip
    return spatial_out.to(spatial.dtype), temporal_out.to(temporal.dtype), saved


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
        saved: from :func:`forward` with the same `recompute`.
        grad_spatial_out: [B, T, 1+N, D]; not read if the spatial stream received nothing.
        grad_temporal_out: [B, T, N, D]; not read if the temporal stream received nothing.
        wanted: for the inputs and each of :data:`~cast_kernels.problem.PARAMETER_NAMES`, whether to compute it.

    The other arguments are those of :func:`forward`.
    """
    core = _native.core()
    alive = Addresses()
    directions = (problem.t2s_window is not None, problem.s2t_window is not None)
    primals = [spatial, temporal, *parameters.flat()]
    # No kernel writes gradients of an empty batch or of an unused up-projection: they are zero.
    unwritten = {6, 7} if not directions[0] else set()
    unwritten |= {12, 13} if not directions[1] else set()
    grads = [
        (zeros if problem.batch == 0 or i in unwritten else float32)(x.shape) if want and x is not None else None
        for i, (x, want) in enumerate(zip(primals, wanted, strict=True))
    ]
    addresses = [0 if g is None else g.data_ptr() for g in grads]
    core.bcast_backward(
        _native_problem(core, problem, eps, recompute), alive(spatial), alive(temporal),
        alive(spatial_scale), alive(temporal_scale), [alive(p) for p in primals[2:]],
        alive(saved), RECOMPUTE_CODES[recompute],
        alive(grad_spatial_out if directions[0] else None),
        alive(grad_temporal_out if directions[1] else None),
        addresses[0], addresses[1], addresses[2:], torch.get_num_threads(),
    )  # fmt: skip
    return [None if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, primals, strict=True)]


def _native_problem(core: Any, problem: Problem, eps: float, recompute: str) -> Any:
    native = core.Problem(
        problem.batch, problem.frames, problem.patches, problem.dim, problem.bottleneck_dim, problem.num_heads,
        _WINDOW_CODES[problem.t2s_window], _WINDOW_CODES[problem.s2t_window], eps, problem.bf16,
    )  # fmt: skip
    native_size = core.saved_per_clip(native, RECOMPUTE_CODES[recompute])
    assert native_size == saved_words(problem, recompute), "the two sides disagree about `saved`"
    return native
