"""LayerNorm and the query-key-value layer, as backend `triton` has them in `self_attention`: operators and autograd.

Compilers and `torch.func` see the registered operator: x -> [queries | keys | values], one tensor with one gradient.
Eager autograd gets a node that hands out the three as views: PyTorch's attention gives back three gradients, and none
is copied beside the others. The node hands on x too: what reaches x past attention, the residual's gradient, is then
added in LayerNorm's backward and not in a pass of its own.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

import cast_kernels.triton.projection as triton_projection
from cast_kernels.ops import _derivatives
from cast_kernels.problem import ProjectionParameters

_LIBRARY = torch.library.Library("cast_kernels", "FRAGMENT")
_LIBRARY.define(
    "projection(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor? qkv_bias, float eps, "
    "ScalarType compute) -> Tensor",
    tags=(torch.Tag.needs_contiguous_strides,),
)
_LIBRARY.define(
    "projection_backward(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor? qkv_bias, "
    "Tensor[] grads, Tensor? grad_residual, float eps, bool[] wanted) -> Tensor[]",
    tags=(torch.Tag.needs_contiguous_strides,),
)


def project(
    x: Tensor, p: ProjectionParameters, num_heads: int, eps: float, compute: torch.dtype, packed: bool
) -> tuple[list[Tensor], Tensor]:
    """LayerNorm(x) Wqkv^T + bqkv, and x.

    Args:
        x: [batch, tokens, D].
        p: weights in any floating dtype.
        num_heads: heads.
        eps: LayerNorm epsilon.
        compute: dtype of the product.
        packed: whether the three are to be one tensor.

    Returns:
        queries, keys and values [batch, tokens, heads, head_dim], or all in one [batch, tokens, 3, heads, head_dim], in
        the compute dtype; and x, by which its other readers are to read it.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _split(_run(x, *p, eps, compute), num_heads, packed), x
    *heads, x = _Projection.apply(x, *p, num_heads, eps, compute, packed)
    return heads, x


def _run(x: Tensor, *rest: Any) -> Tensor:
    rows = torch.ops.cast_kernels.projection(x.reshape(-1, x.shape[-1]), *rest)
    return rows.view(*x.shape[:-1], rows.shape[-1])


def _split(qkv: Tensor, num_heads: int, packed: bool) -> list[Tensor]:
    heads = qkv.unflatten(-1, (3, num_heads, -1))
    return [heads] if packed else list(heads.unbind(2))


class _Projection(torch.autograd.Function):
    """:func:`project` in eager autograd's graph."""

    @staticmethod
    def forward(
        x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int,
        eps: float, compute: torch.dtype, packed: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        qkv = _run(x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps, compute)
        return *_split(qkv, num_heads, packed), x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.eps = inputs[6]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        dim, wanted = x.shape[-1], list(ctx.needs_input_grad[:5])
        *parts, residual = grads
        found = torch.ops.cast_kernels.projection_backward(
            x.reshape(-1, dim), *parameters, [part.flatten(2).flatten(0, 1) for part in parts],
            residual.reshape(-1, dim), ctx.eps, wanted,
        )  # fmt: skip
        given = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
        return None if given[0] is None else given[0].view_as(x), *given[1:], None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _derivatives.refuse_tangents("projection")


# ---------------------------------------------------------------------------------------------------------------------
# The registered operators.


def _forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, eps: float,
    compute: torch.dtype,
) -> Tensor:  # fmt: skip
    return triton_projection.forward(
        x, ProjectionParameters(norm_weight, norm_bias, qkv_weight, qkv_bias), eps, compute
    )


def _forward_fake(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, eps: float,
    compute: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], qkv_weight.shape[0]), dtype=compute)


def _backward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None,
    grads: list[Tensor], grad_residual: Tensor | None, eps: float, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    p = ProjectionParameters(norm_weight, norm_bias, qkv_weight, qkv_bias)
    found = triton_projection.backward(x, p, grads, grad_residual, eps, wanted)
    return [x.new_empty((0,)) if grad is None else grad for grad in found]


def _backward_fake(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None,
    grads: list[Tensor], grad_residual: Tensor | None, eps: float, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    made = (x, norm_weight, norm_bias, qkv_weight, qkv_bias)
    return [
        t.new_empty(t.shape) if want and t is not None else x.new_empty((0,))
        for t, want in zip(made, wanted, strict=True)
    ]


class _Packed(_SingleLevelFunction):
    """The operator in autograd's graph, with one packed gradient; what else reaches x is autograd's to add."""

    @staticmethod
    def forward(ctx: Any, run: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs[:5])
        ctx.eps = inputs[5]
        return _derivatives.below_autograd(lambda: run(*inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        wanted = list(ctx.needs_input_grad[1:6])
        found = torch.ops.cast_kernels.projection_backward(*ctx.saved_tensors, [grad], None, ctx.eps, wanted)
        return None, *(g if want else None for g, want in zip(found, wanted, strict=True)), None, None


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("projection", _forward, _key)
    _LIBRARY.impl("projection_backward", _backward, _key)
torch.library.register_fake("cast_kernels::projection", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("cast_kernels::projection_backward", _backward_fake, lib=_LIBRARY)
_derivatives.register(_LIBRARY, "projection", lambda run, inputs: _Packed.apply(run, *inputs))  # type: ignore[attr-defined]


@register_flop_formula(torch.ops.cast_kernels.projection)
def _forward_flops(x: Any, norm_weight: Any, norm_bias: Any, qkv_weight: Any, *_: Any, **__: Any) -> int:
    """Two per multiply-add, matrix products only, as torch counts them."""
    return 2 * x[0] * x[1] * qkv_weight[0]


@register_flop_formula(torch.ops.cast_kernels.projection_backward)
def _backward_flops(
    x: Any, norm_weight: Any, norm_bias: Any, qkv_weight: Any, qkv_bias: Any, grads: Any, grad_residual: Any, eps: Any,
    wanted: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The products that autograd would run for the wanted gradients."""
    return 2 * x[0] * x[1] * qkv_weight[0] * (any(wanted[:3]) + wanted[3])
