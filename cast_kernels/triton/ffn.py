"""Backend `triton`: the FFN beside its adapter on a GPU.

    norm -> fc1 -> activation -> fc2 -> adapter with both residuals

fc1 and fc2 are PyTorch's products (cuBLAS): at [9456, 768] by [768, 3072] a product is bound by arithmetic, where a
library's assembly is hard to beat. What lies between them is bound by memory, and that is what our kernels cut:
docs/ops/ffn.md counts the bytes. In backward, the gradient that comes through the FFN is the adapter kernel's addend,
so the sum of both gradients of n is no pass; LayerNorm's backward adds the residual's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cast_kernels.problem import FFNParameters, FFNProblem, Recompute, Verdict
from cast_kernels.triton import adapter
from cast_kernels.triton.common import (
    WIDEST_STREAM,
    activations,
    cast_fields,
    exactly,
    in_dtype,
    norms,
    on_device,
    verdict,
)

_WORD = 4  # bytes of an element of `saved`
#: Parameters that the products read in the compute dtype; the adapter has its own.
CAST = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def can_run(problem: FFNProblem) -> Verdict:
    """Whether Triton can run the problem here, and the reason in words either way."""
    if not problem.adapter:
        return Verdict(False, "there is no adapter, and the FFN alone is PyTorch's products in any backend")
    if problem.hidden % 16 or problem.dim > WIDEST_STREAM:
        return Verdict(
            False, f"the FFN has {problem.dim} and {problem.hidden} channels; up to {WIDEST_STREAM}, and a multiple "
            "of 16, are possible",
        )  # fmt: skip
    refused = adapter.sizes_verdict(problem.dim, problem.adapter)
    return refused or verdict(problem.device, problem.gpu, problem.dtype, problem.compute)


def saved_words(problem: FFNProblem) -> int:
    """4-byte words that forward keeps of one row: the values before both activations, if anything."""
    if problem.recompute is not Recompute.NOTHING:
        return 0
    return (problem.hidden + problem.adapter) * problem.compute.itemsize // _WORD


def _kept(problem: FFNProblem, saved: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The values before the FFN's activation [rows, F] and the adapter's [rows, A] in `saved`, or None."""
    if not saved.numel():
        return None, None
    flat, (rows, hidden, adapter) = saved.view(problem.compute), (problem.rows, problem.hidden, problem.adapter)
    return (
        flat.as_strided((rows, hidden), (hidden, 1), flat.storage_offset()),
        flat.as_strided((rows, adapter), (adapter, 1), flat.storage_offset() + rows * hidden),
    )


def forward(
    problem: FFNProblem,
    x: Tensor,
    parameters: FFNParameters,
    row_scale: Tensor | None,
    eps: float,
    adapter_scale: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The stream with both branches added, and what backward needs.

    Args:
        problem: the sizes.
        x: [..., D], `problem.rows` rows, any strides and floating dtype, as are all tensors here.
        parameters: as :class:`~cast_kernels.problem.FFNParameters` describes.
        row_scale: [rows], multiplies the adapter's branch, or None.
        eps: LayerNorm epsilon.
        adapter_scale: factor of the adapter's branch.
        save: whether backward will follow.

    Returns:
        [..., D] in the dtype of `x`, and `saved` [rows, saved_words] (or [rows, 0]), float32 words.
    """
    p, x = parameters, x.contiguous()
    saved = x.new_empty((problem.rows, saved_words(problem) if save else 0), dtype=torch.float32)
    y = torch.empty_like(x)
    if problem.rows:
        with on_device(x), exactly():
            hidden, narrow = _kept(problem, saved)
            w = cast_fields(p, CAST, problem.compute)
            n = norms().launch_norm(x, p.norm_weight, p.norm_bias, eps, problem.compute).view(problem.rows, -1)
            h = torch.addmm(w.fc1_bias, n, w.fc1_weight.t(), out=hidden)
            active = activations().launch_activate(h, problem.activation, in_place=hidden is None)
            branch = torch.addmm(w.fc2_bias, active, w.fc2_weight.t())
            adapter.launch_forward(problem, n, x, branch, y, narrow, p.adapter, row_scale, adapter_scale)
    return y, saved


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
    """Gradients of x and the ten parameters in their dtypes, None where not wanted.

    A frozen tensor costs nothing: no weight gradient, and no walk through the FFN where nothing before it is wanted.

    Args:
        saved: what :func:`forward` returned with `save`.
        grad_y: [..., D].
        wanted: for x and each field of the parameters, whether to compute it.

    The other arguments are those of :func:`forward`.
    """
    p, x, grad_y = parameters, x.contiguous(), grad_y.contiguous()
    primals = [x, *p]
    if problem.rows == 0:
        return [
            torch.zeros_like(t) if want and t is not None else None for t, want in zip(primals, wanted, strict=True)
        ]
    through = any(wanted[:3])  # x or LayerNorm: something before n
    with on_device(x), exactly():
        hidden, narrow = _kept(problem, saved)
        grad = in_dtype(grad_y, problem.compute).view(problem.rows, -1)
        read = _read_by_backward(hidden is None, through, wanted[3:7])
        w = cast_fields(p, read, problem.compute)
        n = norms().launch_norm(x, p.norm_weight, p.norm_bias, eps, problem.compute).view(problem.rows, -1)
        dn, ffn_grads = _ffn_backward(problem, n, hidden, grad, p, w, through, wanted[3:7])
        adapter_grads = adapter.launch_backward(
            problem, grad, n, narrow, dn, dn, p.adapter, row_scale, adapter_scale, wanted[7:]
        )  # the sum of both gradients of n lies in dn now
        norm_grads: list[Tensor | None] = [None] * 3
        if dn is not None:
            norm_grads = norms().launch_norm_backward(x, dn, grad_y, p.norm_weight, p.norm_bias, eps, wanted[:3])
    return [*norm_grads, *ffn_grads, *adapter_grads]


def _read_by_backward(again: bool, through: bool, wanted: tuple[bool, ...]) -> list[str]:
    """The FFN's parameters that :func:`_ffn_backward` reads; `again`: it has the hidden values to multiply again."""
    again = again and (through or any(wanted[:3]))
    read = {"fc1_weight": again or through, "fc1_bias": again, "fc2_weight": through or any(wanted[:2])}
    return [name for name, needed in read.items() if needed]


def _ffn_backward(
    problem: FFNProblem, n: Tensor, h: Tensor | None, grad: Tensor, p: FFNParameters, w: FFNParameters,
    through: bool, wanted: tuple[bool, ...],
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """The FFN's part of the gradient of n (None unless `through`), and its four gradients.

    Args:
        n, grad: [rows, D] in the compute dtype, the FFN's input and its output's gradient.
        p: as the op got them; their gradients have their dtypes.
        w: the same, those of :func:`_read_by_backward` in the compute dtype.
        h: [rows, F] before the activation, or None: multiply again.
        wanted: for fc1_weight, fc1_bias, fc2_weight, fc2_bias.
    """
    kernels = activations()
    dn: Tensor | None = None
    grads: list[Tensor | None] = [None] * 4
    if wanted[3]:
        grads[3] = grad.sum(0, dtype=torch.float32).to(p.fc2_bias.dtype)
    if not (through or any(wanted[:3])):
        return dn, grads
    if h is None:
        h = torch.addmm(w.fc1_bias, n, w.fc1_weight.t())
    if wanted[2]:
        grads[2] = (grad.t() @ kernels.launch_activate(h, problem.activation, in_place=False)).to(p.fc2_weight.dtype)
    if through or any(wanted[:2]):
        dh = grad @ w.fc2_weight
        kernels.launch_activate_backward(h, dh, problem.activation)
        if wanted[0]:
            grads[0] = (dh.t() @ n).to(p.fc1_weight.dtype)
        if wanted[1]:
            grads[1] = dh.sum(0, dtype=torch.float32).to(p.fc1_bias.dtype)
        if through:
            dn = dh @ w.fc1_weight
    return dn, grads
