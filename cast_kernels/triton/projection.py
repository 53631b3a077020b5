"""Backend `triton`: LayerNorm with the query-key-value layer behind it, and back from three gradients without a copy.

    norm -> one product for queries, keys and values

PyTorch's attention kernels return the gradients of queries, keys and values as three dense tensors, and have no variant
that writes into one (2.11 and 2.14). Packing them costs a pass of 6 D elements a row. Here each is an operand of its
own product with its rows of the weight, and the products add up in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cast_kernels.problem import ProjectionParameters
from cast_kernels.triton.common import cast_fields, exactly, norms, on_device


def forward(x: Tensor, p: ProjectionParameters, eps: float, compute: torch.dtype) -> Tensor:
    """LayerNorm(x) Wqkv^T + bqkv.

    Args:
        x: [..., D], any strides.
        p: weights in any floating dtype.
        eps: LayerNorm epsilon.
        compute: dtype of the product.

    Returns:
        [rows, 3 D] in the compute dtype.
    """
    if not x.numel():
        return x.new_empty((0, p.qkv_weight.shape[0]), dtype=compute)
    with on_device(x), exactly():
        p = cast_fields(p, ("qkv_weight",) if p.qkv_bias is None else ("qkv_weight", "qkv_bias"), compute)
        n = norms().launch_norm(x.contiguous(), p.norm_weight, p.norm_bias, eps, compute).view(-1, x.shape[-1])
        return F.linear(n, p.qkv_weight, p.qkv_bias)


def backward(
    x: Tensor,
    p: ProjectionParameters,
    grads: Sequence[Tensor],
    grad_residual: Tensor | None,
    eps: float,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, with `grad_residual` added, and of the four parameters; None where not wanted.

    Args:
        x, p, eps: of :func:`forward`.
        grads: [rows, width] each, in the compute dtype: one behind the other the gradient of what forward returned.
        grad_residual: [..., D], what reaches x on another way, or None.
        wanted: for x and each field of the parameters, whether to compute it.
    """
    if not x.numel():
        return [
            torch.zeros_like(t) if want and t is not None else None for t, want in zip((x, *p), wanted, strict=True)
        ]
    compute, found = grads[0].dtype, list[Tensor | None]([None] * 5)
    with on_device(x), exactly():
        x = x.contiguous()
        if any(wanted[:3]):
            dn = _input_gradient(grads, cast_fields(p, ("qkv_weight",), compute).qkv_weight)
            found[:3] = norms().launch_norm_backward(
                x,
                dn,
                None if grad_residual is None else grad_residual.contiguous(),
                p.norm_weight,
                p.norm_bias,
                eps,
                tuple(wanted[:3]),
            )
        if wanted[3]:
            n = norms().launch_norm(x, p.norm_weight, p.norm_bias, eps, compute).view(-1, x.shape[-1])
            found[3] = torch.cat([grad.t() @ n for grad in grads]).to(p.qkv_weight.dtype)
        if wanted[4] and p.qkv_bias is not None:
            found[4] = torch.cat([grad.sum(0, dtype=torch.float32) for grad in grads]).to(p.qkv_bias.dtype)
    return found


def _input_gradient(grads: Sequence[Tensor], weight: Tensor) -> Tensor:
    """[g0 | g1 | ...] W without putting the parts side by side."""
    total = None
    for grad, rows in zip(grads, weight.split([grad.shape[1] for grad in grads]), strict=True):
        total = grad @ rows if total is None else total.addmm_(grad, rows)
    assert total is not None
    return total
