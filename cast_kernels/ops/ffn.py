"""The op `ffn`: public function, argument checks, and the registered operator that kernel backends share.

Read from the bottom up for the machinery, from the top down for the use:

    ffn()                           checks the arguments, selects a backend
      -> eager: PyTorch operators, seen through by compilers and autograd
      -> kernels: torch.ops.cast_kernels.ffn (schema, fake, autograd, FLOP formula), or straight to the backend
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

import cast_kernels.eager.ffn as eager_ffn
from cast_kernels import backends
from cast_kernels import recompute as levels
from cast_kernels.ops._casts import cast_frozen, frozen
from cast_kernels.ops._checks import (
    autocast_dtype,
    check_adapter,
    check_kinds,
    check_parameters,
    check_row_scale,
    check_shape,
    check_tensors,
    check_width,
    spread_row_scale,
)
from cast_kernels.ops._operator import Call, Operator, flat_scale
from cast_kernels.ops._signatures import listed
from cast_kernels.problem import ACTIVATIONS, FFNParameters, FFNProblem, Recompute
from cast_kernels.triton.ffn import CAST


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
        parameters: weights; without an adapter its four are None.
        activation: of the FFN, "gelu" (erf) or "quick_gelu", x * sigmoid(1.702 x). The adapter's is always erf GELU.
        eps: LayerNorm epsilon.
        adapter_scale: factor of the adapter's branch, the published code's 0.5.
        row_scale: broadcastable to x.shape[:-1], multiplies the adapter's branch (drop path); constant.
        recompute: "nothing" keeps the values before both activations for backward, F + A of them a row; "cheap" and
            "all" multiply again; "auto" decides by shapes and the device's memory (:mod:`cast_kernels.recompute`).
            Backend cpu also keeps two floats a row. Gradients have the same bits with all. Backend eager ignores it.
        backend: "auto", or the one that must run.

    Returns:
        [..., D] in the dtype of `x`. Under autocast, backends that compute in float32 do so.

    Raises:
        ValueError: a shape, size, device or name that does not fit.
        TypeError: dtypes that are mixed or not floating.
        BackendError: `backend` cannot run this problem.
    """
    arguments, known = (activation, eps, adapter_scale, recompute, backend), None
    if type(parameters) is FFNParameters:
        tensors = listed(x, *parameters, row_scale)
        known = OPERATOR.recall(arguments, tensors)
    if known is None:
        problem = pose(x, parameters, activation, recompute)
        check_row_scale(row_scale, x)
        tensors = listed(x, *parameters, row_scale)
        known = OPERATOR.settle(
            arguments, tensors, problem, backends.select(backend, problem), problem.recompute.value,
            (activation, float(eps), float(adapter_scale)),
        )  # fmt: skip
        if known.call.backend == "triton":
            known.frozen = frozen(problem, parameters, CAST)
    row_scale = spread_row_scale(row_scale, x)
    if known.call.backend == "eager":
        return eager_ffn.ffn(known.call.problem, x, parameters, row_scale, eps, adapter_scale)
    if known.call.backend == "triton":
        parameters = cast_frozen(parameters, known.frozen, known.call.compute)
    return OPERATOR.run(known, (x,), parameters, parameters, (row_scale,))[0]


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
        x.dtype, x.device.type, autocast, gpu=x.device.index,
    )  # fmt: skip
    return levels.settle(problem, recompute, x.device)


def _check_parameters(dim: int, p: FFNParameters) -> None:
    """Raise ValueError unless every parameter has the shape that x's width and the two hidden widths imply."""
    hidden = check_width("fc1_weight", p.fc1_weight, dim)
    shapes = {"norm_weight": (dim,), "norm_bias": (dim,), "fc1_bias": (hidden,), "fc2_weight": (dim, hidden)}
    for name, shape in (shapes | {"fc2_bias": (dim,)}).items():
        check_shape(name, getattr(p, name), shape)
    check_adapter(p.adapter._asdict(), dim)


# ---------------------------------------------------------------------------------------------------------------------
# The registered operator: x [..., D] and row_scale [...], which backends see as [rows].


class _FFN(Operator):
    name = "ffn"
    streams: tuple[str, ...] = ("x",)
    read: int = 1
    factors: tuple[str, ...] = ("row_scale",)
    options: tuple[str, ...] = ("str activation", "float eps", "float adapter_scale")
    outputs: tuple[str, ...] = ("y",)

    def problem(
        self, streams: Sequence[Tensor], flat: Sequence[Tensor | None], options: tuple[Any, ...], recompute: str,
        compute: torch.dtype,
    ) -> FFNProblem:  # fmt: skip
        x, p = streams[0], FFNParameters(*flat)  # type: ignore[arg-type]
        return FFNProblem(
            x.numel() // x.shape[-1], x.shape[-1], p.fc1_weight.shape[0],
            0 if p.down_weight is None else p.down_weight.shape[0], options[0], Recompute(recompute), x.dtype,
            x.device.type, None if compute == x.dtype else compute, gpu=x.device.index,
        )  # fmt: skip

    def pack(self, flat: Sequence[Tensor | None]) -> FFNParameters:
        return FFNParameters(*flat)  # type: ignore[arg-type]

    def kept(self, kernels: Any, problem: FFNProblem, recompute: str) -> int:
        return kernels.saved_words(problem)

    def saved_shape(self, streams: Sequence[Tensor], kept: int) -> tuple[int, ...]:
        return streams[0].numel() // streams[0].shape[-1], kept

    def forward(
        self, kernels: Any, call: Call, streams: Sequence[Tensor], parameters: Any, factors: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        scale = flat_scale(factors[0])
        return kernels.forward(call.problem, streams[0], parameters, scale, *call.options[1:], call.kept > 0)

    def backward(
        self, kernels: Any, call: Call, streams: Sequence[Tensor], parameters: Any, saved: Tensor,
        factors: Sequence[Tensor | None], grads: Sequence[Tensor], wanted: tuple[bool, ...],
    ) -> Sequence[Tensor | None]:  # fmt: skip
        scale = flat_scale(factors[0])
        return kernels.backward(
            call.problem, streams[0], parameters, saved, scale, *call.options[1:], grads[0], wanted
        )  # fmt: skip

    def flops(self, streams: Sequence[Any], flat: Sequence[Any], options: tuple[Any, ...]) -> int:
        *lead, dim = streams[0]
        return 4 * prod(lead) * dim * (flat[2][0] + flat[6][0])

    def backward_flops(
        self, streams: Sequence[Any], flat: Sequence[Any], options: tuple[Any, ...], wanted: Sequence[bool]
    ) -> int:
        *lead, dim = streams[0]
        through_norm = any(wanted[:3])
        total = 0
        for width, layer in ((flat[2][0], wanted[3:7]), (flat[6][0], wanted[7:11])):
            first_weight, first_bias, second_weight, _second_bias = layer
            hidden = through_norm or first_weight or first_bias
            total += 2 * prod(lead) * dim * width * (hidden + through_norm + first_weight + second_weight)
        return total


OPERATOR = _FFN()
