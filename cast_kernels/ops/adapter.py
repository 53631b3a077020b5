"""The op `adapter`: public function, argument checks, and the registered operator that kernel backends share.

Read from the bottom up for the machinery, from the top down for the use:

    adapter()                       checks the arguments, selects a backend
      -> eager: PyTorch operators, seen through by compilers and autograd
      -> kernels: torch.ops.cast_kernels.adapter (schema, fake, autograd, FLOP formula), or straight to the backend
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

import cast_kernels.eager.adapter as eager_adapter
from cast_kernels import backends
from cast_kernels import recompute as levels
from cast_kernels.ops._checks import (
    autocast_dtype,
    check_adapter,
    check_kinds,
    check_parameters,
    check_row_scale,
    check_shape,
    check_tensors,
    spread_row_scale,
)
from cast_kernels.ops._operator import Call, Operator, flat_scale
from cast_kernels.ops._signatures import listed
from cast_kernels.problem import AdapterParameters, AdapterProblem, Recompute


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
        skip: whether x is added too, as after attention; the kernel then sums its gradient.
        scale: factor of the branch.
        row_scale: broadcastable to x.shape[:-1], multiplies the branch (drop path); constant.
        recompute: "nothing" keeps the values before GELU for backward, A elements a row in the compute dtype; "cheap"
            and "all" keep nothing besides `x` and multiply again; "auto" decides by shapes and the device's memory
            (:mod:`cast_kernels.recompute`). Backend eager ignores it.
        backend: "auto", or the one that must run.

    Returns:
        [..., D] in the dtype of `residual`.

    Raises:
        ValueError: a shape, size, device or name that does not fit.
        TypeError: dtypes that are mixed or not floating.
        BackendError: `backend` cannot run this problem.
    """
    arguments, known = (skip, scale, recompute, backend), None
    if type(parameters) is AdapterParameters:
        tensors = listed(x, residual, *parameters, row_scale)
        known = OPERATOR.recall(arguments, tensors)
    if known is None:
        problem = pose(x, parameters, residual, skip, recompute)
        check_row_scale(row_scale, residual)
        tensors = listed(x, residual, *parameters, row_scale)
        known = OPERATOR.settle(
            arguments, tensors, problem, backends.select(backend, problem), problem.recompute.value,
            (bool(skip), float(scale)),
        )  # fmt: skip
    row_scale = spread_row_scale(row_scale, residual)
    if known.call.backend == "eager":
        return eager_adapter.adapter(known.call.problem, x, residual, parameters, row_scale, scale)
    return OPERATOR.run(known, (x, residual), parameters, parameters, (row_scale,))[0]


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
        autocast, gpu=x.device.index,
    )  # fmt: skip
    return levels.settle(problem, recompute, x.device)


# ---------------------------------------------------------------------------------------------------------------------
# The registered operator: streams [..., D] and row_scale [...], which backends see as [rows]. The residual's gradient
# is the output's own.


class _Adapter(Operator):
    name = "adapter"
    streams: tuple[str, ...] = ("x", "residual")
    read: int = 1
    factors: tuple[str, ...] = ("row_scale",)
    options: tuple[str, ...] = ("bool skip", "float scale")
    outputs: tuple[str, ...] = ("y",)

    def problem(
        self, streams: Sequence[Tensor], flat: Sequence[Tensor | None], options: tuple[Any, ...], recompute: str,
        compute: torch.dtype,
    ) -> AdapterProblem:  # fmt: skip
        x, residual, p = streams[0], streams[1], self.pack(flat)
        return AdapterProblem(
            x.numel() // x.shape[-1], x.shape[-1], p.down_weight.shape[0], options[0], Recompute(recompute),
            residual.dtype, x.device.type, None if compute == residual.dtype else compute, gpu=x.device.index,
        )  # fmt: skip

    def pack(self, flat: Sequence[Tensor | None]) -> AdapterParameters:
        return AdapterParameters(*flat)  # type: ignore[arg-type]

    def kept(self, kernels: Any, problem: AdapterProblem, recompute: str) -> int:
        return kernels.saved_words(problem)

    def saved_shape(self, streams: Sequence[Tensor], kept: int) -> tuple[int, ...]:
        return streams[0].numel() // streams[0].shape[-1], kept

    def forward(
        self, kernels: Any, call: Call, streams: Sequence[Tensor], parameters: Any, factors: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        scale = flat_scale(factors[0])
        return kernels.forward(call.problem, *streams, parameters, scale, call.options[1], call.kept > 0)

    def backward(
        self, kernels: Any, call: Call, streams: Sequence[Tensor], parameters: Any, saved: Tensor,
        factors: Sequence[Tensor | None], grads: Sequence[Tensor], wanted: tuple[bool, ...],
    ) -> Sequence[Tensor | None]:  # fmt: skip
        scale = flat_scale(factors[0])
        return kernels.backward(call.problem, streams[0], parameters, saved, scale, call.options[1], grads[0], wanted)

    def flops(self, streams: Sequence[Any], flat: Sequence[Any], options: tuple[Any, ...]) -> int:
        return 4 * prod(streams[0]) * flat[0][0]

    def backward_flops(
        self, streams: Sequence[Any], flat: Sequence[Any], options: tuple[Any, ...], wanted: Sequence[bool]
    ) -> int:
        hidden = any(wanted[:3])
        return 2 * prod(streams[0]) * flat[0][0] * (hidden + wanted[0] + wanted[1] + wanted[3])


OPERATOR = _Adapter()
