"""Backend `triton`: the adapter with its residual, one launch forward; back, one launch for rows, one for weights.

This file owns memory and launches; the kernels lie beside it. The ops around the adapter (`ffn`) launch through
:func:`launch_forward` and :func:`launch_backward`, which take what those ops have at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cast_kernels.problem import AdapterParameters, AdapterProblem, Recompute, Verdict
from cast_kernels.triton import tiles
from cast_kernels.triton.common import architecture, cast_fields, on_device, verdict

#: Widest adapter: a row of it must fit in a program's registers.
MOST_CHANNELS = 768
#: Parameters that the kernels read in the compute dtype.
MATRICES = ("down_weight", "up_weight")
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
    return sizes_verdict(problem.dim, problem.adapter) or verdict(problem.device, problem.dtype, problem.compute)


def saved_per_row(problem: AdapterProblem) -> int:
    """4-byte words that forward keeps of one row: h, if anything."""
    return problem.adapter * problem.compute.itemsize // _WORD if problem.recompute is Recompute.NOTHING else 0


def _kept(problem: AdapterProblem, saved: Tensor) -> Tensor | None:
    """h [rows, A] in `saved` [rows, saved_per_row], or None where it was not kept."""
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
        x: [rows, D], the adapter's input, any strides and floating dtype, as are all tensors here.
        residual: [rows, D].
        parameters: as :class:`~cast_kernels.problem.AdapterParameters` describes.
        row_scale: [rows], multiplies the branch, or None.
        scale: factor of the branch.
        save: whether backward will follow.

    Returns:
        [rows, D] in the dtype of `residual`, and `saved` [rows, saved_per_row] (or [rows, 0]), float32 words.
    """
    saved = x.new_empty((problem.rows, saved_per_row(problem) if save else 0), dtype=torch.float32)
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    if problem.rows:
        with on_device(x):
            weights = cast_fields(parameters, MATRICES, problem.compute)
            launch_forward(
                x, residual, x if problem.skip else None, y, _kept(problem, saved), weights, row_scale, scale
            )
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
        grad_y: [rows, D].
        wanted: for x and each field of the parameters, whether to compute it.

    The other arguments are those of :func:`forward`.
    """
    primals = [x, *parameters]
    if problem.rows == 0:
        return [torch.zeros_like(p) if want else None for p, want in zip(primals, wanted, strict=True)]
    with on_device(x):
        weights = cast_fields(parameters, MATRICES, problem.compute)
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
        if any(wanted[1:]):
            grad_y = grad_y.to(problem.compute)  # once: the sums over rows need it so
        grads = launch_backward(
            grad_y, x, _kept(problem, saved), grad_y if problem.skip else None, grad_x, parameters, weights, row_scale,
            scale, wanted[1:],
        )  # fmt: skip
    return [grad_x, *grads]


def _contiguous(weights: AdapterParameters) -> AdapterParameters:
    return AdapterParameters(*(w.detach().contiguous() for w in weights))


def _constants(kernel: str, weights: AdapterParameters) -> dict[str, Any]:
    """Sizes and tile of one kernel, as it takes them."""
    width, dim = weights.down_weight.shape
    tile = tiles.find(architecture(), kernel, weights.down_weight.dtype.itemsize * 8, width)
    chunk, chunks = tiles.chunking(width)
    return {
        "DIM": dim, "D": width, "BM": tile.rows, "BK": tile.k, "BN": tile.columns, "CHUNK": chunk, "CHUNKS": chunks,
        "STAGES": tile.stages, "WIDEN_STAGES": tile.widen_stages, "num_warps": tile.warps,
    }  # fmt: skip


def launch_forward(
    x: Tensor,
    residual: Tensor,
    other: Tensor | None,
    y: Tensor,
    h: Tensor | None,
    weights: AdapterParameters,
    row_scale: Tensor | None,
    scale: float,
) -> None:
    """Fill y = residual [+ other] + scale * row_scale * adapter(x), and `h` if it is given.

    Args:
        x, residual, other: [rows, D] with at least one row.
        y: [rows, D], contiguous.
        h: [rows, A] in the compute dtype, contiguous.
        weights: both matrices in the compute dtype.
        row_scale: [rows].
        scale: factor of the branch.
    """
    from cast_kernels.triton.adapter_forward import adapter_forward

    rows, constants = x.shape[0], _constants("adapter_forward", weights)
    residual = residual.contiguous()
    adapter_forward[(-(-rows // constants["BM"]),)](
        x.contiguous(), residual, residual if other is None else other.contiguous(), y, y if h is None else h,
        y if row_scale is None else row_scale.float().contiguous(), *_contiguous(weights), rows, scale,
        OTHER=other is not None, SCALED=row_scale is not None, STORE_H=h is not None, **constants,
    )  # fmt: skip


def launch_backward(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor | None,
    addend: Tensor | None,
    grad_x: Tensor | None,
    parameters: AdapterParameters,
    weights: AdapterParameters,
    row_scale: Tensor | None,
    scale: float,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Fill grad_x = [addend +] the adapter's own part; return the four parameters' gradients, in their dtypes.

    Args:
        grad_y, x: [rows, D] with at least one row, grad_y in the compute dtype if any of `wanted` is true.
        h: [rows, A] as :func:`launch_forward` filled it, or None: multiply again.
        addend: [rows, D], the gradient of x that comes another way; may be `grad_x`.
        grad_x: [rows, D], contiguous, or None where it is not wanted.
        parameters: as the op got them; their gradients have their dtypes.
        weights, row_scale, scale: as in :func:`launch_forward`.
        wanted: for each parameter, whether its gradient is.
    """
    from cast_kernels.triton import sums, weight_gradient
    from cast_kernels.triton.adapter_backward import adapter_backward

    train = any(wanted)
    if grad_x is None and not train:
        return [None] * len(wanted)
    rows, (width, dim), compute = x.shape[0], weights.down_weight.shape, weights.down_weight.dtype
    constants = _constants("adapter_backward", weights)
    programs = -(-rows // constants["BM"])
    grad_y, x = grad_y.contiguous(), x.contiguous()
    g, dh = (x.new_empty((rows if train else 1, width), dtype=compute) for _ in range(2))
    partial = x.new_empty((programs if train else 1, dim + width), dtype=torch.float32)
    adapter_backward[(programs,)](
        grad_y, x, g if h is None else h, x if addend is None else addend.contiguous(), x if grad_x is None else grad_x,
        g, dh, partial, partial if row_scale is None else row_scale.float().contiguous(), *_contiguous(weights)[:3],
        rows, scale, ADDEND=addend is not None, SCALED=row_scale is not None, RECOMPUTE_H=h is None,
        WANT_X=grad_x is not None, WANT_PARAMETERS=train, **constants,
    )  # fmt: skip
    if not train:
        return [None] * len(wanted)
    grads = AdapterParameters(*(torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters))
    layers = []
    if wanted[0]:
        layers.append(weight_gradient.Layer(dh, x.to(compute), grads.down_weight))
    if wanted[2]:
        layers.append(weight_gradient.Layer(grad_y, g, grads.up_weight))
    if layers:
        tile = tiles.find(architecture(), "weight_gradient", compute.itemsize * 8, width)
        weight_gradient.launch(layers, tile)
    if wanted[1] or wanted[3]:
        sums.reduce([sums.Reduction(partial, [grads.up_bias, grads.down_bias])])
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
