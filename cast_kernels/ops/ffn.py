"""The op `ffn`: public function, argument checks, and the registered operator that kernel backends share.

Read from the bottom up for the machinery, from the top down for the use:

    ffn()                           checks the arguments, selects a backend
      -> eager: PyTorch operators, seen through by compilers and autograd
      -> kernels: torch.ops.cast_kernels.ffn (schema, fake, autograd, FLOP formula)
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import cast_kernels.cpu.ffn as cpu_ffn
import cast_kernels.eager.ffn as eager_ffn
import cast_kernels.triton.ffn as triton_ffn
from cast_kernels import backends
from cast_kernels import recompute as levels
from cast_kernels.ops import _derivatives
from cast_kernels.ops._casts import cast_frozen
from cast_kernels.ops._checks import (
    autocast_dtype,
    check_adapter,
    check_kinds,
    check_parameters,
    check_row_scale,
    check_shape,
    check_tensors,
    check_width,
)
from cast_kernels.problem import ACTIVATIONS, FFNParameters, FFNProblem, Recompute

#: Backends that run through the registered operator: the module with `forward`, `backward`, `saved_per_row`.
KERNELS: dict[str, ModuleType] = {"triton": triton_ffn, "cpu": cpu_ffn}


def ffn(
    x: Tensor,
    parameters: FFNParameters,
    *,
    activation: str = "gelu",
    eps: float,
    adapter_scale: float = 0.5,
    row_scale: Tensor | None = None,
    recompute: Recompute | str = levels.AUTO,
    backend: str = "auto",
) -> Tensor:
    """The second half of an expert's block: LayerNorm, FFN and adapter, residual (paper section 3.2, equations 4, 5).

    y = x + FFN(n) + row_scale * adapter_scale * Adapter(n) with n = LN(x). The FFN's hidden values never reach main
    memory in inference on the CPU.

    Args:
        x: [..., D], any leading dimensions, any strides.
        parameters: weights; the adapter's four are None together where there is no adapter.
        activation: of the FFN, "gelu" (erf) or "quick_gelu", x * sigmoid(1.702 x). The adapter's is always erf GELU.
        eps: LayerNorm epsilon.
        adapter_scale: factor of the adapter's branch, the published code's 0.5.
        row_scale: broadcastable to x.shape[:-1], times the adapter's branch (drop path); constant.
        recompute: "nothing" keeps the values before both activations for backward, F + A of them a row; "cheap" and
            "all" multiply again; "auto" is a rule of shapes and the GPU's memory (:mod:`cast_kernels.recompute`).
            Backend cpu keeps two floats a row besides. Gradients have the same bits. Backend eager ignores it.
        backend: "auto", or the one that must run.

    Returns:
        [..., D] in the dtype of `x`. Under autocast, backends that compute in float32 do so.

    Raises:
        ValueError: a shape, size, device or name that does not fit.
        TypeError: dtypes that are mixed or not floating.
        BackendError: `backend` cannot run this problem.
    """
    problem = pose(x, parameters, activation, recompute)
    row_scale = check_row_scale(row_scale, x)
    chosen = backends.select(backend, problem)
    if chosen == "eager":
        return eager_ffn.ffn(problem, x, parameters, row_scale, eps, adapter_scale)
    if chosen == "triton":
        parameters = cast_frozen(problem, parameters, triton_ffn.CAST)
    rows = x.reshape(-1, x.shape[-1])
    flat_scale = None if row_scale is None else row_scale.reshape(-1)
    return _run_kernel(chosen, problem, rows, parameters, flat_scale, eps, adapter_scale).view(x.shape)


def pose(
    x: Tensor, parameters: FFNParameters, activation: str = "gelu", recompute: Recompute | str = levels.AUTO
) -> FFNProblem:
    """Check the arguments of :func:`ffn` and return the problem they pose.

    Raises:
        ValueError, TypeError: as :func:`ffn`.
    """
    check_tensors({"x": x})
    check_parameters(parameters, FFNParameters)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [..., D] with at least one channel")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed: {', '.join(map(repr, ACTIVATIONS))}")
    levels.check(recompute)
    _check_parameters(x.shape[-1], parameters)
    autocast = autocast_dtype(x)
    check_kinds({"x": x}, parameters, autocast is not None)
    problem = FFNProblem(
        x.numel() // x.shape[-1], x.shape[-1], parameters.fc1_weight.shape[0],
        0 if parameters.down_weight is None else parameters.down_weight.shape[0], activation, Recompute.CHEAP,
        x.dtype, x.device.type, autocast,
    )  # fmt: skip
    return levels.settle(problem, recompute, x.device)


def _check_parameters(dim: int, p: FFNParameters) -> None:
    """Every parameter has the shape that x's width and the two hidden widths imply; an adapter is there or not."""
    hidden = check_width("fc1_weight", p.fc1_weight, dim)
    shapes = {"norm_weight": (dim,), "norm_bias": (dim,), "fc1_bias": (hidden,), "fc2_weight": (dim, hidden)}
    for name, shape in (shapes | {"fc2_bias": (dim,)}).items():
        check_shape(name, getattr(p, name), shape)
    check_adapter({name: getattr(p, name) for name in FFNParameters._fields[6:]}, dim)


# ---------------------------------------------------------------------------------------------------------------------
# The registered operator; ops/bcast.py says why `kept` is an argument and why an absent parameter is an empty tensor.

_LIBRARY = torch.library.Library("cast_kernels", "FRAGMENT")
_LIBRARY.define(
    "ffn(Tensor x, Tensor[] parameters, Tensor? row_scale, str activation, float eps, float adapter_scale, "
    "str recompute, ScalarType compute, SymInt kept, str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_contiguous_strides,),
)
_LIBRARY.define(
    "ffn_backward(Tensor x, Tensor[] parameters, Tensor saved, Tensor? row_scale, Tensor grad_y, str activation, "
    "float eps, float adapter_scale, str recompute, ScalarType compute, bool[] wanted, str backend) -> Tensor[]",
    tags=(torch.Tag.needs_contiguous_strides,),
)


def _run_kernel(
    backend: str,
    problem: FFNProblem,
    x: Tensor,
    parameters: FFNParameters,
    row_scale: Tensor | None,
    eps: float,
    adapter_scale: float,
) -> Tensor:
    """Call the registered operator on x [rows, D]; under autocast dtypes may be mixed."""
    absent = x.new_empty(0)
    flat = [absent if p is None else p for p in parameters]
    needs_grad = _derivatives.may_be_differentiated((x, *flat))
    kept = KERNELS[backend].saved_per_row(problem) if needs_grad else 0
    y, _ = torch.ops.cast_kernels.ffn(
        x, flat, row_scale, problem.activation, eps, adapter_scale, problem.recompute.value, problem.compute, kept,
        backend,
    )  # fmt: skip
    return y


def _present(flat: list[Tensor]) -> FFNParameters:
    return FFNParameters(*flat[:6], *(p if p.numel() else None for p in flat[6:]))


def _problem(x: Tensor, flat: list[Tensor], activation: str, recompute: str, compute: torch.dtype) -> FFNProblem:
    hidden, adapter = flat[2].shape[0], flat[6].shape[0]
    return FFNProblem(
        x.shape[0], x.shape[1], hidden, adapter, activation, Recompute(recompute), x.dtype, x.device.type,
        None if compute == x.dtype else compute,
    )  # fmt: skip


def _forward(
    x: Tensor, parameters: list[Tensor], row_scale: Tensor | None, activation: str, eps: float, adapter_scale: float,
    recompute: str, compute: torch.dtype, kept: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = _problem(x, parameters, activation, recompute, compute)
    return KERNELS[backend].forward(problem, x, _present(parameters), row_scale, eps, adapter_scale, kept > 0)


def _forward_fake(
    x: Tensor, parameters: list[Tensor], row_scale: Tensor | None, activation: str, eps: float, adapter_scale: float,
    recompute: str, compute: torch.dtype, kept: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty((x.shape[0], kept), dtype=torch.float32)


def _backward(
    x: Tensor, parameters: list[Tensor], saved: Tensor, row_scale: Tensor | None, grad_y: Tensor, activation: str,
    eps: float, adapter_scale: float, recompute: str, compute: torch.dtype, wanted: list[bool], backend: str,
) -> list[Tensor]:  # fmt: skip
    problem = _problem(x, parameters, activation, recompute, compute)
    grads = KERNELS[backend].backward(
        problem, x, _present(parameters), saved, row_scale, eps, adapter_scale, grad_y, tuple(wanted)
    )
    return [g if g is not None else p.new_empty((0,)) for g, p in zip(grads, [x, *parameters], strict=True)]


def _backward_fake(
    x: Tensor, parameters: list[Tensor], saved: Tensor, row_scale: Tensor | None, grad_y: Tensor, activation: str,
    eps: float, adapter_scale: float, recompute: str, compute: torch.dtype, wanted: list[bool], backend: str,
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape if want else (0,)) for t, want in zip([x, *parameters], wanted, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, flat, row_scale, activation, eps, adapter_scale, recompute, compute, _, backend = inputs
    ctx.save_for_backward(x, *flat, row_scale, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.call = (activation, eps, adapter_scale, recompute, compute)
    ctx.wanted = [t.requires_grad for t in (x, *flat)]
    ctx.backend = backend


def _autograd(ctx: Any, grad_y: Tensor, _: None) -> tuple[Any, ...]:
    x, *flat, row_scale, saved = ctx.saved_tensors
    grads = torch.ops.cast_kernels.ffn_backward(
        x, flat, saved, row_scale, grad_y, *ctx.call, ctx.wanted, ctx.backend
    )  # fmt: skip
    given = [grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True)]
    return given[0], given[1:], *(None,) * 8


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("ffn", _forward, _key)
    _LIBRARY.impl("ffn_backward", _backward, _key)
torch.library.register_fake("cast_kernels::ffn", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("cast_kernels::ffn_backward", _backward_fake, lib=_LIBRARY)
_derivatives.register(_LIBRARY, "ffn", _setup_context, _autograd)


@register_flop_formula(torch.ops.cast_kernels.ffn)
def _forward_flops(x: Any, parameters: Any, *_: Any, **__: Any) -> int:
    """Two per multiply-add, matrix products only, as torch counts them."""
    rows, dim = x
    return 4 * rows * dim * (parameters[2][0] + parameters[6][0])


@register_flop_formula(torch.ops.cast_kernels.ffn_backward)
def _backward_flops(
    x: Any, parameters: Any, saved: Any, row_scale: Any, grad_y: Any, activation: Any, eps: Any, adapter_scale: Any,
    recompute: Any, compute: Any, wanted: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The products that autograd would run for the wanted gradients; what is multiplied again is not counted."""
    rows, dim = x
    through_norm = any(wanted[:3])
    total = 0
    for width, layer in ((parameters[2][0], wanted[3:7]), (parameters[6][0], wanted[7:11])):
        first_weight, first_bias, second_weight, _second_bias = layer
        hidden = through_norm or first_weight or first_bias
        total += 2 * rows * dim * width * (hidden + through_norm + first_weight + second_weight)
    return total
