"""Backend `cpu`: the FFN beside its adapter in native C++, forward and backward.

Streams and weights are float32 or bfloat16. The core computes in float32; bfloat16 is widened here, without loss, and
each result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cast_kernels import _native
from cast_kernels.cpu.common import Addresses, float32, verdict, zeros
from cast_kernels.problem import ACTIVATIONS, FFNParameters, FFNProblem, Recompute, Verdict


def can_run(problem: FFNProblem) -> Verdict:
    """Whether the native core can run the problem, and why or why not.

    Raises:
        ValueError: CAST_KERNELS_CPU_ISA names no instruction-set level.
    """
    return verdict(problem.device, problem.dtype, problem.autocast)


def saved_words(problem: FFNProblem) -> int:
    """Floats that backward needs of one row; `csrc/cpu/ffn.h` lays them out."""
    return 2 + (problem.hidden + problem.adapter if problem.recompute is Recompute.NOTHING else 0)


def forward(
    problem: FFNProblem,
    x: Tensor,
    parameters: FFNParameters,
    row_scale: Tensor | None,
    eps: float,
    adapter_scale: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The stream with both branches added, and `saved` for backward.

    Args:
        problem: the sizes.
        x: [..., D], `problem.rows` rows, any strides, as are all tensors here.
        parameters: as :class:`~cast_kernels.problem.FFNParameters` describes.
        row_scale: [rows], multiplies the adapter's branch, or None.
        eps: LayerNorm epsilon.
        adapter_scale: factor of the adapter's branch.
        save: whether backward will follow.

    Returns:
        [..., D] in the dtype of `x`, and `saved` [rows, saved_words] (or [rows, 0]), float32.
    """
    core, inputs = _native.core(), Addresses()
    native = _native_problem(core, problem, eps, adapter_scale)
    y = float32(x.shape)
    saved = float32((problem.rows, saved_words(problem) if save else 0))
    core.ffn_forward(
        native, inputs(x), [inputs(p) for p in parameters], inputs(row_scale), y.data_ptr(), saved.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y.to(x.dtype), saved


def backward(
    problem: FFNProblem,
    x: Tensor,
    parameters: FFNParameters,
    saved: Tensor,
    row_scale: Tensor | None,
    eps: float,
    adapter_scale: float,
    grad_y: Tensor,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of x and the ten parameters, None where not wanted, each in its tensor's dtype.

    Args:
        saved: from :func:`forward` with `save`.
        grad_y: [..., D].
        wanted: for x and each field of the parameters, whether to compute it.

    The other arguments are those of :func:`forward`.
    """
    core, inputs = _native.core(), Addresses()
    make = zeros if problem.rows == 0 else float32  # without rows the core writes nothing
    primals = [x, *parameters]
    grads = [
        make(p.shape) if want and p is not None else None for p, want in zip(primals, wanted, strict=True)
    ]  # fmt: skip
    addresses = [0 if g is None else g.data_ptr() for g in grads]
    core.ffn_backward(
        _native_problem(core, problem, eps, adapter_scale), inputs(x), [inputs(p) for p in parameters],
        inputs(row_scale), inputs(saved), inputs(grad_y), addresses[0], addresses[1:], torch.get_num_threads(),
    )  # fmt: skip
    return [g if g is None or p is None else g.to(p.dtype) for g, p in zip(grads, primals, strict=True)]


def _native_problem(core: Any, problem: FFNProblem, eps: float, adapter_scale: float) -> Any:
    native = core.FFNProblem(
        problem.rows, problem.dim, problem.hidden, problem.adapter, ACTIVATIONS.index(problem.activation),
        problem.recompute is Recompute.NOTHING, eps, adapter_scale, problem.bf16,
    )  # fmt: skip
    assert core.ffn_saved_per_row(native) == saved_words(problem), "the two sides disagree about `saved`"
    return native
