"""The op `self_attention`: public function, argument checks, and the registered operator that kernel backends share.

Read from the bottom up for the machinery, from the top down for the use:

    self_attention()                checks the arguments, selects a backend
      -> eager: PyTorch operators, seen through by compilers and autograd
      -> triton: PyTorch's attention between the operators of _projection.py and the op `adapter`
      -> cpu: torch.ops.cast_kernels.self_attention (schema, fake, autograd, FLOP formula)
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import cast_kernels.cpu.self_attention as cpu_self_attention
import cast_kernels.eager.self_attention as eager_self_attention
import cast_kernels.triton.self_attention as triton_self_attention
from cast_kernels import attention as attentions
from cast_kernels import backends
from cast_kernels import recompute as levels
from cast_kernels.ops import _derivatives
from cast_kernels.ops._casts import cast_frozen
from cast_kernels.ops._checks import (
    autocast_dtype,
    check_adapter,
    check_kinds,
    check_parameters,
    check_shape,
    check_tensors,
)
from cast_kernels.ops._projection import project
from cast_kernels.ops.adapter import adapter
from cast_kernels.problem import (
    AdapterParameters,
    ProjectionParameters,
    Recompute,
    SelfAttentionParameters,
    SelfAttentionProblem,
)

#: Backends that run through the registered operator: the module with `forward`, `backward`, `saved_size`. Backend
#: `triton` does not: its attention is PyTorch's, with autograd of its own.
KERNELS: dict[str, ModuleType] = {"cpu": cpu_self_attention}


def self_attention(
    x: Tensor,
    parameters: SelfAttentionParameters,
    *,
    num_heads: int,
    eps: float,
    recompute: Recompute | str = levels.AUTO,
    backend: str = "auto",
    attention: str = "auto",
) -> Tensor:
    """The first half of an expert's block: attention, its adapter in series, residual (paper section 3.2, equation 3).

    y = x + a + Adapter(a) with a = proj(softmax(q k^T / sqrt(D / heads)) v) and [q | k | v] = LN(x) Wqkv^T + bqkv.
    Scores never reach main memory.

    Args:
        x: [batch, tokens, D], any strides. The tokens of a batch entry attend together: the frame of a clip for the
            spatial expert, the whole clip for the temporal one.
        parameters: weights; the adapter's four are None together where there is no adapter (y = x + a).
        num_heads: heads; divides D.
        eps: LayerNorm epsilon.
        recompute: what forward keeps besides `x` for backward, in floats a token beside two for each head and two:
            "nothing" 5 D + A (queries, keys, values, attention's output, a, the adapter's hidden values), "cheap" 4 D
            (without the last two), "all" D (attention's output alone). The rest is computed again, with the same bits.
            Backend triton keeps what PyTorch's operators keep, and with "nothing" A elements a token more. Backend
            eager ignores it. "auto" is a rule of shapes and the GPU's memory (:mod:`cast_kernels.recompute`).
        backend: "auto", or the one that must run.
        attention: "auto", or the kernel that must attend, a key of :data:`cast_kernels.attention.ATTENTIONS`; backend
            cpu has its own and takes "auto" only. :func:`cast_kernels.attention.explain` says which can, and why.

    Returns:
        [batch, tokens, D] in the dtype of `x`. Under autocast, backends that compute in float32 do so.

    Raises:
        ValueError: a shape, size, device or name that does not fit.
        TypeError: dtypes that are mixed or not floating.
        BackendError: `backend` cannot run this problem.
    """
    problem = pose(x, parameters, num_heads, recompute, attention)
    chosen = backends.select(backend, problem)
    if chosen == "eager":
        return eager_self_attention.self_attention(problem, x, parameters, eps)
    if chosen == "triton":
        parameters = cast_frozen(problem, parameters, triton_self_attention.CAST)
        return triton_self_attention.self_attention(problem, x, parameters, _Parts(problem, eps))
    return _run_kernel(chosen, problem, x, parameters, eps)


class _Parts(NamedTuple):
    """Of backend `triton`: what stands on both sides of PyTorch's attention."""

    problem: SelfAttentionProblem
    eps: float

    def project(self, x: Tensor, p: ProjectionParameters, packed: bool) -> tuple[list[Tensor], Tensor]:
        return project(x, p, self.problem.num_heads, self.eps, self.problem.compute, packed)

    def adapt(self, a: Tensor, p: AdapterParameters, residual: Tensor) -> Tensor:
        return adapter(a, p, residual=residual, skip=True, recompute=self.problem.recompute, backend="triton")


def pose(
    x: Tensor, parameters: SelfAttentionParameters, num_heads: int, recompute: Recompute | str = levels.AUTO,
    attention: str = "auto",
) -> SelfAttentionProblem:  # fmt: skip
    """Check the arguments of :func:`self_attention` and return the problem they pose.

    Raises:
        ValueError, TypeError: as :func:`self_attention`.
    """
    check_tensors({"x": x})
    check_parameters(parameters, SelfAttentionParameters)
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be [batch, tokens, D], 3 dimensions, with at least one token and "
            "one channel (flatten what attends together into tokens and all else into batch)"
        )
    batch, tokens, dim = x.shape
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads is {num_heads}; it must divide the stream's {dim} channels")
    levels.check(recompute)
    attentions.check_name(attention)
    _check_parameters(dim, parameters)
    autocast = autocast_dtype(x)
    check_kinds({"x": x}, parameters, autocast is not None)
    width = 0 if parameters.down_weight is None else parameters.down_weight.shape[0]
    problem = SelfAttentionProblem(
        batch, tokens, dim, num_heads, width, Recompute.CHEAP, x.dtype, x.device.type, autocast, attention
    )
    return levels.settle(problem, recompute, x.device)


def _check_parameters(dim: int, p: SelfAttentionParameters) -> None:
    """Every parameter has the shape that x's width and the adapter's imply; an adapter is there or not."""
    shapes: dict[str, tuple[int, ...]] = {"norm_weight": (dim,), "norm_bias": (dim,), "qkv_weight": (3 * dim, dim)}
    shapes |= {"proj_weight": (dim, dim), "proj_bias": (dim,)}
    if p.qkv_bias is not None:
        shapes["qkv_bias"] = (3 * dim,)
    for name, shape in shapes.items():
        check_shape(name, getattr(p, name), shape)
    check_adapter({name: getattr(p, name) for name in SelfAttentionParameters._fields[6:]}, dim)


# ---------------------------------------------------------------------------------------------------------------------
# The registered operator; ops/bcast.py says why `kept` is an argument and why an absent parameter is an empty tensor.

_LIBRARY = torch.library.Library("cast_kernels", "FRAGMENT")
_LIBRARY.define(
    "self_attention(Tensor x, Tensor[] parameters, int num_heads, float eps, str recompute, bool bf16, SymInt kept, "
    "str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_contiguous_strides,),
)
_LIBRARY.define(
    "self_attention_backward(Tensor x, Tensor[] parameters, Tensor saved, Tensor grad_y, int num_heads, float eps, "
    "str recompute, bool bf16, bool[] wanted, str backend) -> Tensor[]",
    tags=(torch.Tag.needs_contiguous_strides,),
)


def _run_kernel(
    backend: str, problem: SelfAttentionProblem, x: Tensor, parameters: SelfAttentionParameters, eps: float
) -> Tensor:
    """Call the registered operator; dtypes may be mixed under autocast: kernels take each tensor as it is."""
    absent = x.new_empty(0)
    flat = [absent if p is None else p for p in parameters]
    needs_grad = _derivatives.may_be_differentiated((x, *flat))
    kept = KERNELS[backend].saved_size(problem) if needs_grad else 0
    y, _ = torch.ops.cast_kernels.self_attention(
        x, flat, problem.num_heads, eps, problem.recompute.value, problem.bf16, kept, backend
    )
    return y


def _present(flat: list[Tensor]) -> SelfAttentionParameters:
    return SelfAttentionParameters(*(p if p.numel() else None for p in flat))  # type: ignore[arg-type]


def _problem(x: Tensor, flat: list[Tensor], num_heads: int, recompute: str, bf16: bool) -> SelfAttentionProblem:
    batch, tokens, dim = x.shape
    return SelfAttentionProblem(
        batch,
        tokens,
        dim,
        num_heads,
        flat[6].shape[0],
        Recompute(recompute),
        x.dtype,
        x.device.type,
        torch.bfloat16 if bf16 else None,
    )


def _forward(
    x: Tensor, parameters: list[Tensor], num_heads: int, eps: float, recompute: str, bf16: bool, kept: int, backend: str
) -> tuple[Tensor, Tensor]:
    problem = _problem(x, parameters, num_heads, recompute, bf16)
    return KERNELS[backend].forward(problem, x, _present(parameters), eps, kept > 0)


def _forward_fake(
    x: Tensor, parameters: list[Tensor], num_heads: int, eps: float, recompute: str, bf16: bool, kept: int, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((kept,), dtype=torch.float32)


def _backward(
    x: Tensor, parameters: list[Tensor], saved: Tensor, grad_y: Tensor, num_heads: int, eps: float, recompute: str,
    bf16: bool, wanted: list[bool], backend: str,
) -> list[Tensor]:  # fmt: skip
    problem = _problem(x, parameters, num_heads, recompute, bf16)
    grads = KERNELS[backend].backward(problem, x, _present(parameters), saved, eps, grad_y, tuple(wanted))
    return [g if g is not None else p.new_empty((0,)) for g, p in zip(grads, [x, *parameters], strict=True)]


def _backward_fake(
    x: Tensor, parameters: list[Tensor], saved: Tensor, grad_y: Tensor, num_heads: int, eps: float, recompute: str,
    bf16: bool, wanted: list[bool], backend: str,
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape if want else (0,)) for t, want in zip([x, *parameters], wanted, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, flat, num_heads, eps, recompute, bf16, _, backend = inputs
    ctx.save_for_backward(x, *flat, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.call = (num_heads, eps, recompute, bf16)
    ctx.wanted = [t.requires_grad for t in (x, *flat)]
    ctx.backend = backend


def _autograd(ctx: Any, grad_y: Tensor, _: None) -> tuple[Any, ...]:
    x, *flat, saved = ctx.saved_tensors
    grads = torch.ops.cast_kernels.self_attention_backward(x, flat, saved, grad_y, *ctx.call, ctx.wanted, ctx.backend)
    given = [grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True)]
    return given[0], given[1:], *(None,) * 6


_LIBRARY.impl("self_attention", _forward, "CPU")
_LIBRARY.impl("self_attention_backward", _backward, "CPU")
torch.library.register_fake("cast_kernels::self_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("cast_kernels::self_attention_backward", _backward_fake, lib=_LIBRARY)
_derivatives.register(_LIBRARY, "self_attention", _setup_context, _autograd)


@register_flop_formula(torch.ops.cast_kernels.self_attention)
def _forward_flops(x: Any, parameters: Any, *_: Any, **__: Any) -> int:
    """Two per multiply-add, matrix products only, as torch counts them."""
    batch, tokens, dim = x
    return 2 * batch * tokens * dim * (4 * dim + 2 * tokens + 2 * parameters[6][0])


@register_flop_formula(torch.ops.cast_kernels.self_attention_backward)
def _backward_flops(
    x: Any, parameters: Any, saved: Any, grad_y: Any, num_heads: Any, eps: Any, recompute: Any, bf16: Any, wanted: Any,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The products that autograd would run for the wanted gradients; what is multiplied again is not counted."""
    batch, tokens, dim = x
    adapter = parameters[6][0]
    norm, inner = any(wanted[:3]), any(wanted[:5])
    projected = inner or wanted[5] or wanted[6]
    hidden = projected or wanted[7] or wanted[8]
    attention = inner * (dim + 4 * tokens) + wanted[5] * dim + norm * 3 * dim + wanted[3] * 3 * dim
    return 2 * batch * tokens * dim * (attention + adapter * (hidden + projected + wanted[7] + wanted[9]))
