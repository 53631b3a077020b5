"""The op `adapter`: public function, argument checks, and the registered operator that kernel backends share.

Read from the bottom up for the machinery, from the top down for the use:

    adapter()                       checks the arguments, selects a backend
      -> eager: PyTorch operators, seen through by compilers and autograd
      -> kernels: torch.ops.cast_kernels.adapter (schema, fake, autograd, FLOP formula)
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import cast_kernels.eager.adapter as eager_adapter
import cast_kernels.triton.adapter as triton_adapter
from cast_kernels import backends
from cast_kernels import recompute as levels
from cast_kernels.ops import _derivatives
from cast_kernels.ops._checks import (
    autocast_dtype,
    check_adapter,
    check_kinds,
    check_parameters,
    check_row_scale,
    check_shape,
    check_tensors,
)
from cast_kernels.problem import AdapterParameters, AdapterProblem, Recompute

#: Backends that run through the registered operator: the module with `forward`, `backward`, `saved_per_row`.
KERNELS: dict[str, ModuleType] = {"triton": triton_adapter}


def adapter(
    x: Tensor,
    parameters: AdapterParameters,
    *,
    residual: Tensor,
    skip: bool = False,
    scale: float = 1.0,
    row_scale: Tensor | None = None,
    recompute: Recompute | str = levels.AUTO,
    backend: str = "auto",
) -> Tensor:
    """An adapter and the residual it is added to (paper section 3.2): down, GELU, up.

    y = residual + [x +] row_scale * scale * (GELU(x Wd^T + bd) Wu^T + bu)

    Args:
        x: [..., D], the adapter's input, any leading dimensions, any strides.
        parameters: weights.
        residual: [..., D], the same shape.
        skip: whether x is added too, as beside attention; its gradient is then summed in the kernel.
        scale: factor of the branch.
        row_scale: broadcastable to x.shape[:-1], times the branch (drop path); constant.
        recompute: "nothing" keeps the values before GELU for backward, A elements a row in the compute dtype; "cheap"
            and "all" keep nothing besides `x` and multiply again; "auto" is a rule of shapes and the GPU's memory
            (:mod:`cast_kernels.recompute`). Backend eager ignores it.
        backend: "auto", or the one that must run.

    Returns:
        [..., D] in the dtype of `residual`.

    Raises:
        ValueError: a shape, size, device or name that does not fit.
        TypeError: dtypes that are mixed or not floating.
        BackendError: `backend` cannot run this problem.
    """
    problem = pose(x, parameters, residual, skip, recompute)
    row_scale = check_row_scale(row_scale, residual)
    chosen = backends.select(backend, problem)
    if chosen == "eager":
        return eager_adapter.adapter(problem, x, residual, parameters, row_scale, scale)
    flat_scale = None if row_scale is None else row_scale.reshape(-1)
    rows = x.reshape(-1, problem.dim), residual.reshape(-1, problem.dim)
    return _run_kernel(chosen, problem, *rows, parameters, flat_scale, scale).view(x.shape)


def pose(
    x: Tensor,
    parameters: AdapterParameters,
    residual: Tensor,
    skip: bool = False,
    recompute: Recompute | str = levels.AUTO,
) -> AdapterProblem:
    """Check the arguments of :func:`adapter` and return the problem they pose.

    Raises:
        ValueError, TypeError: as :func:`adapter`.
    """
    check_tensors({"x": x, "residual": residual})
    check_parameters(parameters, AdapterParameters)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [..., D] with at least one channel")
    check_shape("residual", residual, tuple(x.shape))
    levels.check(recompute)
    dim = x.shape[-1]
    if any(p is None for p in parameters):
        absent = [name for name, p in parameters._asdict().items() if p is None]
        raise ValueError(f"{' and '.join(absent)} missing; an adapter has four tensors")
    check_adapter(parameters._asdict(), dim)
    autocast = autocast_dtype(x)
    check_kinds({"x": x, "residual": residual}, parameters, autocast is not None)
    problem = AdapterProblem(
        x.numel() // dim, dim, parameters.down_weight.shape[0], skip, Recompute.CHEAP, residual.dtype, x.device.type,
        autocast,
    )  # fmt: skip
    return levels.settle(problem, recompute, x.device)


# ---------------------------------------------------------------------------------------------------------------------
# The registered operator; ops/bcast.py says why `kept` is an argument. The residual's gradient is the output's own.

_LIBRARY = torch.library.Library("cast_kernels", "FRAGMENT")
_LIBRARY.define(
    "adapter(Tensor x, Tensor residual, Tensor[] parameters, Tensor? row_scale, bool skip, float scale, "
    "str recompute, ScalarType compute, SymInt kept, str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_contiguous_strides,),
)
_LIBRARY.define(
    "adapter_backward(Tensor x, Tensor[] parameters, Tensor saved, Tensor? row_scale, Tensor grad_y, bool skip, "
    "float scale, str recompute, ScalarType compute, bool[] wanted, str backend) -> Tensor[]",
    tags=(torch.Tag.needs_contiguous_strides,),
)


def _run_kernel(
    backend: str,
    problem: AdapterProblem,
    x: Tensor,
    residual: Tensor,
    parameters: AdapterParameters,
    row_scale: Tensor | None,
    scale: float,
) -> Tensor:
    """Call the registered operator on x and residual [rows, D]; under autocast dtypes may be mixed."""
    needs_grad = _derivatives.may_be_differentiated((x, *parameters))
    kept = KERNELS[backend].saved_per_row(problem) if needs_grad else 0
    y, _ = torch.ops.cast_kernels.adapter(
        x, residual, list(parameters), row_scale, problem.skip, scale, problem.recompute.value, problem.compute, kept,
        backend,
    )  # fmt: skip
    return y


def _problem(
    x: Tensor, residual: Tensor, flat: list[Tensor], skip: bool, recompute: str, compute: torch.dtype
) -> AdapterProblem:
    return AdapterProblem(
        x.shape[0], x.shape[1], flat[0].shape[0], skip, Recompute(recompute), residual.dtype, x.device.type,
        None if compute == residual.dtype else compute,
    )  # fmt: skip


def _forward(
    x: Tensor, residual: Tensor, parameters: list[Tensor], row_scale: Tensor | None, skip: bool, scale: float,
    recompute: str, compute: torch.dtype, kept: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = _problem(x, residual, parameters, skip, recompute, compute)
    return KERNELS[backend].forward(problem, x, residual, AdapterParameters(*parameters), row_scale, scale, kept > 0)


def _forward_fake(
    x: Tensor, residual: Tensor, parameters: list[Tensor], row_scale: Tensor | None, skip: bool, scale: float,
    recompute: str, compute: torch.dtype, kept: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return residual.new_empty(residual.shape), x.new_empty((x.shape[0], kept), dtype=torch.float32)


def _backward(
    x: Tensor, parameters: list[Tensor], saved: Tensor, row_scale: Tensor | None, grad_y: Tensor, skip: bool,
    scale: float, recompute: str, compute: torch.dtype, wanted: list[bool], backend: str,
) -> list[Tensor]:  # fmt: skip
    problem = _problem(x, grad_y, parameters, skip, recompute, compute)
    grads = KERNELS[backend].backward(
        problem, x, AdapterParameters(*parameters), saved, row_scale, scale, grad_y, tuple(wanted)
    )
    return [g if g is not None else p.new_empty((0,)) for g, p in zip(grads, [x, *parameters], strict=True)]


def _backward_fake(
    x: Tensor, parameters: list[Tensor], saved: Tensor, row_scale: Tensor | None, grad_y: Tensor, skip: bool,
    scale: float, recompute: str, compute: torch.dtype, wanted: list[bool], backend: str,
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape if want else (0,)) for t, want in zip([x, *parameters], wanted, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, flat, row_scale, skip, scale, recompute, compute, _, backend = inputs
    ctx.save_for_backward(x, *flat, row_scale, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.call = (skip, scale, recompute, compute)
    ctx.wanted = [t.requires_grad for t in (x, *flat)]
    ctx.residual, ctx.backend = residual.requires_grad, backend


def _autograd(ctx: Any, grad_y: Tensor, _: None) -> tuple[Any, ...]:
    x, *flat, row_scale, saved = ctx.saved_tensors
    grads = [None] * len(ctx.wanted)
    if any(ctx.wanted):
        grads = torch.ops.cast_kernels.adapter_backward(
            x, flat, saved, row_scale, grad_y, *ctx.call, ctx.wanted, ctx.backend
        )
    given = [grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True)]
    return given[0], grad_y if ctx.residual else None, given[1:], *(None,) * 7


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("adapter", _forward, _key)
    _LIBRARY.impl("adapter_backward", _backward, _key)
torch.library.register_fake("cast_kernels::adapter", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("cast_kernels::adapter_backward", _backward_fake, lib=_LIBRARY)
_derivatives.register(_LIBRARY, "adapter", _setup_context, _autograd)


@register_flop_formula(torch.ops.cast_kernels.adapter)
def _forward_flops(x: Any, residual: Any, parameters: Any, *_: Any, **__: Any) -> int:
    """Two per multiply-add, matrix products only, as torch counts them."""
    rows, dim = x
    return 4 * rows * dim * parameters[0][0]


@register_flop_formula(torch.ops.cast_kernels.adapter_backward)
def _backward_flops(
    x: Any, parameters: Any, saved: Any, row_scale: Any, grad_y: Any, skip: Any, scale: Any, recompute: Any,
    compute: Any, wanted: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The products that autograd would run for the wanted gradients; what is multiplied again is not counted."""
    rows, dim = x
    hidden = any(wanted[:3])
    return 2 * rows * dim * parameters[0][0] * (hidden + wanted[0] + wanted[1] + wanted[3])
