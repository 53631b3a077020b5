"""Backend `triton`: the adapter with its residual, one launch forward; back, one launch for rows, one for weights.

This file owns memory and launches; the kernels lie beside it. The ops around the adapter (`ffn`) launch through
:func:`launch_forward` and :func:`launch_backward`, which take what those ops have at hand.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cast_kernels.problem import AdapterParameters, AdapterProblem, FFNProblem, Recompute, Verdict
from cast_kernels.triton.common import adapter_plans, in_dtype, on_device, verdict

if TYPE_CHECKING:
    from cast_kernels.triton.adapter_plan import Sizes

#: Widest adapter: a row of it must fit in a program's registers.
MOST_CHANNELS = 768
_WORD = 4  # bytes of an element of `saved`


def sizes_verdict(dim: int, width: int) -> Verdict | None:
    """Why the kernels cannot take these sizes, or None."""
    if width % 16 or not 0 < width <= MOST_CHANNELS:
        return Verdict(False, f"the adapter has {width} channels; a multiple of 16 up to {MOST_CHANNELS} fits")
    if dim % 16:
        return Verdict(False, f"the stream has {dim} channels; a multiple of 16 is needed")
    return None


def can_run(problem: AdapterProblem) -> Verdict:
    """Whether Triton can run the problem here, and the reason in words either way."""
    return sizes_verdict(problem.dim, problem.adapter) or verdict(
        problem.device, problem.gpu, problem.dtype, problem.compute
    )


def saved_words(problem: AdapterProblem) -> int:
    """4-byte words that forward keeps of one row: h, if anything."""
    return problem.adapter * problem.compute.itemsize // _WORD if problem.recompute is Recompute.NOTHING else 0


def _kept(problem: AdapterProblem, saved: Tensor) -> Tensor | None:
    """h [rows, A] in `saved` [rows, saved_words], or None where it was not kept."""
    return saved.view(problem.compute) if saved.numel() else None


def forward(
    problem: AdapterProblem,
    x: Tensor,
    residual: Tensor,
    parameters: AdapterParameters,
    row_scale: Tensor | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The residual with the adapter's branch added, and what backward needs.

    Args:
        problem: the sizes.
        x: [..., D], the adapter's input, `problem.rows` rows, any strides and floating dtype, as are all tensors here.
        residual: [..., D].
        parameters: as :class:`~cast_kernels.problem.AdapterParameters` describes.
        row_scale: [rows], multiplies the branch, or None.
        scale: factor of the branch.
        save: whether backward will follow.

    Returns:
        [..., D] in the dtype of `residual`, and `saved` [rows, saved_words] (or [rows, 0]), float32 words.
    """
    saved = x.new_empty((problem.rows, saved_words(problem) if save else 0), dtype=torch.float32)
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    if problem.rows:
        other, h = x if problem.skip else None, _kept(problem, saved)
        with on_device(x):
            launch_forward(problem, x, residual, other, y, h, parameters, row_scale, scale)
    return y, saved


def backward(
    problem: AdapterProblem,
    x: Tensor,
    parameters: AdapterParameters,
    saved: Tensor,
    row_scale: Tensor | None,
    scale: float,
    grad_y: Tensor,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of x and the four parameters in their dtypes, None where not wanted. The residual's is `grad_y`.

    Args:
        saved: what :func:`forward` returned with `save`.
        grad_y: [..., D].
        wanted: for x and each field of the parameters, whether to compute it.

    The other arguments are those of :func:`forward`.
    """
    primals = [x, *parameters]
    if problem.rows == 0:
        return [torch.zeros_like(p) if want else None for p, want in zip(primals, wanted, strict=True)]
    with on_device(x):
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
        if any(wanted[1:]):
            grad_y = in_dtype(grad_y, problem.compute)  # once: the sums over rows need it so
        grads = launch_backward(
            problem, grad_y, x, _kept(problem, saved), grad_y if problem.skip else None, grad_x, parameters,
            row_scale, scale, wanted[1:],
        )  # fmt: skip
    return [grad_x, *grads]


def launch_forward(
    problem: AdapterProblem | FFNProblem,
    x: Tensor,
    residual: Tensor,
    other: Tensor | None,
    y: Tensor,
    h: Tensor | None,
    parameters: AdapterParameters,
    row_scale: Tensor | None,
    scale: float,
) -> None:
    """Fill y = residual [+ other] + scale * row_scale * adapter(x), and `h` if it is given.

    Args:
        problem: its sizes and compute dtype; matrices in another dtype are rounded in a launch of their own.
        x, residual, other: [..., D] with at least one row.
        y: [..., D], contiguous.
        h: [rows, A] in the compute dtype, contiguous.
        parameters: in any floating dtype.
        row_scale: [rows].
        scale: factor of the branch.
    """
    plans = adapter_plans()
    kind = plans.Forward(x.dtype, residual.dtype, None if other is None else other.dtype, h is not None)
    read = _there(x, residual, other, _factors(row_scale), *parameters)
    filled = [y] if h is None else [y, h]
    plan = plans.forward_plan(_sizes(problem, parameters, row_scale, scale), kind)
    plan.run([*read, *filled], inputs=len(read))


def launch_backward(
    problem: AdapterProblem | FFNProblem,
    grad_y: Tensor,
    x: Tensor,
    h: Tensor | None,
    addend: Tensor | None,
    grad_x: Tensor | None,
    parameters: AdapterParameters,
    row_scale: Tensor | None,
    scale: float,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Fill grad_x = [addend +] the adapter's own part; return the four parameters' gradients, in their dtypes.

    Args:
        problem: as in :func:`launch_forward`.
        grad_y, x: [..., D] with at least one row, grad_y in the compute dtype if any of `wanted` is true.
        h: [rows, A] as :func:`launch_forward` filled it, or None: multiply again.
        addend: [..., D], the gradient of x that comes another way; may be `grad_x`.
        grad_x: [..., D], contiguous, or None where it is not wanted.
        parameters: as the op got them; their gradients have their dtypes.
        row_scale, scale: as in :func:`launch_forward`.
        wanted: for each parameter, whether its gradient is.
    """
    plans = adapter_plans()
    if grad_x is None and not any(wanted):
        return [None] * len(wanted)
    if any(wanted):
        x = in_dtype(x, problem.compute)
    dtypes = {p.dtype for p in parameters}
    dtype = dtypes.pop() if len(dtypes) == 1 else reduce(torch.promote_types, dtypes)
    kind = plans.Backward(
        grad_y.dtype, x.dtype, h is not None, None if addend is None else addend.dtype,
        None if grad_x is None else grad_x.dtype, dtype, wanted,
    )  # fmt: skip
    read = _there(grad_y, x, h, addend, _factors(row_scale), *parameters[:3])
    grads = [
        torch.empty_like(p, dtype=dtype, memory_format=torch.contiguous_format) if want else None
        for p, want in zip(parameters, wanted, strict=True)
    ]
    plan = plans.backward_plan(_sizes(problem, parameters, row_scale, scale), kind)
    plan.run([*read, *_there(grad_x, *grads)], inputs=len(read))
    return [None if grad is None else in_dtype(grad, p.dtype) for grad, p in zip(grads, parameters, strict=True)]


def _sizes(
    problem: AdapterProblem | FFNProblem, p: AdapterParameters, row_scale: Tensor | None, scale: float
) -> Sizes:  # fmt: skip
    made: Sizes = adapter_plans().Sizes(
        problem.rows, problem.dim, problem.adapter, problem.compute, (p[0].dtype, p[1].dtype, p[2].dtype, p[3].dtype),
        row_scale is not None, scale,
    )  # fmt: skip
    return made


def _factors(row_scale: Tensor | None) -> Tensor | None:
    return None if row_scale is None else row_scale.float()


def _there(*tensors: Tensor | None) -> list[Tensor]:
    """Those that are there, contiguous."""
    return [t.contiguous() for t in tensors if t is not None]
