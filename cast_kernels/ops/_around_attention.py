"""Backend `triton`'s code around PyTorch's attention: a node of eager autograd before it and one behind it.

    x -> _Before: LayerNorm, queries, keys, values -> attention -> _Behind: output projection, adapter, residual -> y

Compilers and `torch.func` see operators instead: `cast_kernels::projection` (one tensor with one gradient), a linear
layer, and `cast_kernels::adapter`. `_Before` returns queries, keys and values as views, so the three gradients of
PyTorch's attention need no copy into one tensor. It returns x too: LayerNorm's backward then adds the residual's
gradient, without a separate pass. `_Behind` is for calls that nothing observes: one node replaces the seven of views,
casts, linear layer and adapter.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

import cast_kernels.triton.projection as triton_projection
from cast_kernels import attention, backends
from cast_kernels.ops import _derivatives
from cast_kernels.ops import adapter as adapters
from cast_kernels.ops._operator import Call, Checked, straight_back
from cast_kernels.ops._signatures import watched
from cast_kernels.problem import (
    AdapterParameters,
    AdapterProblem,
    ProjectionParameters,
    SelfAttentionParameters,
    SelfAttentionProblem,
)
from cast_kernels.triton.common import exactly, in_dtype

_OPERATORS = getattr(torch.ops, _derivatives.NAMESPACE)
_LIBRARY = torch.library.Library(_derivatives.NAMESPACE, "FRAGMENT")
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


def self_attention(checked: Checked, x: Tensor, p: SelfAttentionParameters, eps: float) -> Tensor:
    """The stream with attention and adapter added, in its shape.

    Args:
        checked: the call.
        x: the stream, batch and tokens of one or more dimensions each, any strides.
        p: with an adapter.
        eps: LayerNorm epsilon.
    """
    problem: SelfAttentionProblem = checked.call.problem
    name = attention.select(problem)
    layout, straight = attention.layout(name), checked.kernels is not None and not watched()
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        heads, residual = _as_heads(_run(x, *p.before, eps, problem.compute), problem, layout), x
    else:
        *heads, residual = _Before.apply(checked, straight, layout, eps, x, *p.before)  # type: ignore[attr-defined]
    mixed = attention.attend_as(name, layout, heads)
    if straight:
        return _Behind.apply(checked, layout, mixed, residual, p.proj_weight, p.proj_bias, *p.adapter)  # type: ignore[attr-defined]
    a = F.linear(_in_rows(mixed, layout).view(x.shape), p.proj_weight, p.proj_bias)
    return adapters.adapter(a, p.adapter, residual=residual, skip=True, recompute=problem.recompute, backend="triton")


def behind(checked: Checked) -> Checked:
    """The adapter's call inside of a call of self-attention."""
    call, p = checked.call, checked.call.problem
    problem = AdapterProblem(p.batch * p.tokens, p.dim, p.adapter, True, p.recompute, p.dtype, p.device, p.autocast)
    kernels: Any = backends.load("triton", "adapter")
    kept = kernels.saved_words(problem) if checked.differentiated else 0
    own = Call((True, 1.0), call.recompute, call.compute, kept, call.backend, problem)
    return Checked(own, kernels, checked.differentiated)


def _run(x: Tensor, *rest: Any) -> Tensor:
    found: Tensor = _OPERATORS.projection(x.reshape(-1, x.shape[-1]), *rest)
    return found


def _as_heads(qkv: Tensor, problem: SelfAttentionProblem, layout: str) -> list[Tensor]:
    """[batch * tokens, 3 D] in the layout of the attention's arguments."""
    heads = qkv.view(problem.batch, problem.tokens, 3, problem.num_heads, problem.head_dim)
    if layout == attention.PACKED_HEADS:
        return [heads]
    return list((heads.transpose(1, 3) if layout == attention.HEADS_FIRST else heads).unbind(2))


def _in_rows(x: Tensor, layout: str) -> Tensor:
    """The attention's result, or the gradient of an argument, from this layout to [batch * tokens, channels]."""
    if layout == attention.HEADS_FIRST:
        x = x.transpose(1, 2)
    batch, tokens, *channels = x.shape
    return x.reshape(batch * tokens, math.prod(channels))


class _Before(_SingleLevelFunction):
    """LayerNorm, queries, keys and values. The returned x is for x's other readers."""

    @staticmethod
    def forward(
        ctx: Any, checked: Checked, straight: bool, layout: str, eps: float, x: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:  # fmt: skip
        problem = checked.call.problem
        if straight:
            p = ProjectionParameters(*parameters)  # type: ignore[arg-type]
            with torch._C._AutoDispatchBelowAutograd():
                qkv = triton_projection.forward(x, p, eps, problem.compute)
        else:
            qkv = _run(x, *parameters, eps, problem.compute)
        ctx.save_for_backward(x, *parameters)
        ctx.checked, ctx.layout, ctx.eps = checked, layout, eps
        return *_as_heads(qkv, problem, layout), x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        checked, layout, kept = ctx.checked, ctx.layout, ctx.saved_tensors
        x, wanted = kept[0], list(ctx.needs_input_grad[4:])
        parts, residual = [_in_rows(grad, layout) for grad in grads[:-1]], grads[-1]
        if straight_back(checked, kept, grads):
            p = ProjectionParameters(*kept[1:])
            with torch._C._AutoDispatchBelowAutograd():
                return *(None,) * 4, *triton_projection.backward(x, p, parts, residual, ctx.eps, wanted)
        rows, added = (t.reshape(-1, x.shape[-1]) for t in (x, residual))
        found = _OPERATORS.projection_backward(rows, *kept[1:], parts, added, ctx.eps, wanted)
        given = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
        return *(None,) * 4, None if given[0] is None else given[0].view_as(x), *given[1:]

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _derivatives.refuse_tangents("projection")


class _Behind(_SingleLevelFunction):
    """The output projection, and the adapter with its skip and the residual."""

    @staticmethod
    def forward(
        ctx: Any, checked: Checked, layout: str, mixed: Tensor, residual: Tensor, weight: Tensor, bias: Tensor,
        *own: Tensor,
    ) -> Tensor:  # fmt: skip
        problem, inner = checked.call.problem, checked.inner
        assert inner is not None
        with torch._C._AutoDispatchBelowAutograd(), exactly():
            rows = _in_rows(mixed, layout)
            cast = in_dtype(weight, problem.compute)
            a = torch.addmm(in_dtype(bias, problem.compute), rows, cast.t())
            y, saved = adapters.OPERATOR.forward(
                inner.kernels, inner.call, (a, residual), AdapterParameters(*own), (None,)
            )
        # PyTorch's attention keeps `rows` anyway: they are its result.
        ctx.save_for_backward(cast, rows if weight.requires_grad else None, a, *own, None, saved)
        ctx.inner, ctx.layout, ctx.dtypes = inner, layout, (weight.dtype, bias.dtype)
        ctx.shape = problem.batch, problem.tokens, problem.num_heads, problem.head_dim
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, rows, *kept = ctx.saved_tensors
        mixed, residual, *linear_and_own = ctx.needs_input_grad[2:]
        linear, own = linear_and_own[:2], linear_and_own[2:]
        wanted = (mixed or any(linear), *own)
        grad_a, *found = adapters.OPERATOR.gradients(ctx.inner.call, ctx.inner, kept, (grad,), wanted)
        grads: list[Tensor | None] = [None] * 3
        if grad_a is not None:
            with exactly():
                if mixed:
                    heads = (grad_a @ weight).view(ctx.shape)
                    grads[0] = heads.transpose(1, 2) if ctx.layout == attention.HEADS_FIRST else heads
                if linear[0]:
                    grads[1] = (grad_a.t() @ rows).to(ctx.dtypes[0])
                if linear[1]:
                    grads[2] = grad_a.sum(0, dtype=torch.float32).to(ctx.dtypes[1])
        return None, None, grads[0], grad if residual else None, *grads[1:], *found


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
    """The operator in autograd's graph, with one packed gradient. Autograd adds x's other gradients."""

    @staticmethod
    def forward(ctx: Any, run: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs[:5])
        ctx.eps = inputs[5]
        return _derivatives.below_autograd(lambda: run(*inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        wanted = list(ctx.needs_input_grad[1:6])
        found = _OPERATORS.projection_backward(*ctx.saved_tensors, [grad], None, ctx.eps, wanted)
        return None, *(g if want else None for g, want in zip(found, wanted, strict=True)), None, None


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("projection", _forward, _key)
    _LIBRARY.impl("projection_backward", _backward, _key)
torch.library.register_fake(f"{_derivatives.NAMESPACE}::projection", _forward_fake, lib=_LIBRARY)
torch.library.register_fake(f"{_derivatives.NAMESPACE}::projection_backward", _backward_fake, lib=_LIBRARY)
_derivatives.register(_LIBRARY, "projection", lambda run, inputs: _Packed.apply(run, *inputs))  # type: ignore[attr-defined]


@register_flop_formula(_OPERATORS.projection)
def _forward_flops(x: Any, norm_weight: Any, norm_bias: Any, qkv_weight: Any, *_: Any, **__: Any) -> int:
    """Two per multiply-add, matrix products only, as torch counts them."""
    return 2 * x[0] * x[1] * qkv_weight[0]


@register_flop_formula(_OPERATORS.projection_backward)
def _backward_flops(
    x: Any, norm_weight: Any, norm_bias: Any, qkv_weight: Any, qkv_bias: Any, grads: Any, grad_residual: Any, eps: Any,
    wanted: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The products that autograd would run for the wanted gradients."""
    return 2 * x[0] * x[1] * qkv_weight[0] * (any(wanted[:3]) + wanted[3])
