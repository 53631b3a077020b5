"""The op `self_attention`: public function, argument checks, and the registered operator that kernel backends share.

Read from the bottom up for the machinery, from the top down for the use:

    self_attention()                checks the arguments, selects a backend
      -> eager: PyTorch operators, seen through by compilers and autograd
      -> triton: two nodes around PyTorch's attention; compilers see the op `adapter` and PyTorch's operators
      -> cpu: torch.ops.cast_kernels.self_attention (schema, fake, autograd, FLOP formula), or straight to the backend
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cast_kernels.eager.self_attention as eager_self_attention
from cast_kernels import attention as attentions
from cast_kernels import backends
from cast_kernels import recompute as levels
from cast_kernels.ops import _around_attention
from cast_kernels.ops._casts import cast_frozen, frozen
from cast_kernels.ops._checks import (
    autocast_dtype,
    check_adapter,
    check_kinds,
    check_parameters,
    check_shape,
    check_tensors,
)
from cast_kernels.ops._operator import Call, Operator
from cast_kernels.ops._signatures import listed
from cast_kernels.problem import Recompute, SelfAttentionParameters, SelfAttentionProblem
from cast_kernels.triton.self_attention import CAST


def self_attention(
    x: Tensor,
    parameters: SelfAttentionParameters,
    *,
    num_heads: int,
    eps: float,
    dims: tuple[int, int] = (1, 1),
    recompute: Recompute | str = levels.AUTO,
    backend: str = "auto",
    attention: str = "auto",
) -> Tensor:
    """The first half of an expert's block: attention, its adapter in series, residual (paper section 3.2, equation 3).

    y = x + a + Adapter(a) with a = proj(softmax(q k^T / sqrt(D / heads)) v) and [q | k | v] = LN(x) Wqkv^T + bqkv.
    Scores never reach main memory.

    Args:
        x: [batch, tokens, D], any strides. The tokens of a batch entry attend together: a frame of a clip for the
            spatial expert, the whole clip for the temporal one.
        parameters: weights; without an adapter its four are None, and y = x + a.
        num_heads: heads; divides D.
        eps: LayerNorm epsilon.
        dims: how many dimensions of `x` are batch entries, and how many are tokens: (2, 1) for [clips, frames, tokens,
            D] if each frame attends to itself, (1, 2) if each clip does.
        recompute: how much forward keeps besides `x` for backward, in floats a token, without two for each head and two
            more: "nothing" 5 D + A (queries, keys, values, attention's output, a, the adapter's hidden values), "cheap"
            4 D (without the last two), "all" D (attention's output alone). Backward computes the rest again, with the
            same bits. Backend triton: PyTorch's operators keep their own, and "nothing" adds A elements a token.
            Backend eager ignores it. "auto" decides by shapes and the device's memory (:mod:`cast_kernels.recompute`).
        backend: "auto", or the one that must run.
        attention: "auto", or the kernel that must attend, a key of :data:`cast_kernels.attention.ATTENTIONS`; backend
            cpu has its own and takes "auto" only. :func:`cast_kernels.attention.explain` lists which can run, and why.

    Returns:
        `x`'s shape and dtype. Under autocast, backends that compute in float32 do so.

    Raises:
        ValueError: a shape, size, device or name that does not fit.
        TypeError: dtypes that are mixed or not floating.
        BackendError: `backend` cannot run this problem.
    """
    arguments, known = (num_heads, eps, dims, recompute, backend, attention), None
    if type(parameters) is SelfAttentionParameters:
        tensors = listed(x, *parameters)
        known = OPERATOR.recall(arguments, tensors)
    if known is None:
        problem = pose(x, parameters, num_heads, recompute, attention, dims)
        tensors = listed(x, *parameters)
        known = OPERATOR.settle(
            arguments, tensors, problem, backends.select(backend, problem), problem.recompute.value,
            (num_heads, float(eps)),
        )  # fmt: skip
        if known.call.backend == "triton":
            known.frozen = frozen(problem, parameters, CAST)
            known.inner = None if known.kernels is None else _around_attention.behind(known)
    problem, chosen = known.call.problem, known.call.backend
    if chosen == "triton":
        return _around_attention.self_attention(known, x, cast_frozen(parameters, known.frozen, problem.compute), eps)
    entries = x if x.ndim == 3 else x.reshape(problem.batch, problem.tokens, problem.dim)
    if chosen == "eager":
        y = eager_self_attention.self_attention(problem, entries, parameters, eps)
    else:
        y = OPERATOR.run(known, (entries,), parameters, parameters)[0]
    return y if x.ndim == 3 else y.view(x.shape)


def pose(
    x: Tensor, parameters: SelfAttentionParameters, num_heads: int, recompute: Recompute | str = levels.AUTO,
    attention: str = "auto", dims: tuple[int, int] = (1, 1),
) -> SelfAttentionProblem:  # fmt: skip
    """Check the arguments of :func:`self_attention` and return the problem they pose.

    Raises:
        ValueError, TypeError: as :func:`self_attention`.
    """
    check_tensors({"x": x})
    check_parameters(parameters, SelfAttentionParameters)
    if len(dims) != 2 or min(dims) < 1:
        raise ValueError(f"dims is {dims}; it must be two numbers from 1 on, of dimensions for batch and for tokens")
    if x.ndim != sum(dims) + 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be [batch, tokens, D], with dims={dims} of {sum(dims) + 1} "
            f"dimensions: {dims[0]} for batch, {dims[1]} for tokens, one for channels (flatten it, or let `dims` say "
            "which attend together)"
        )
    batch, tokens, dim = math.prod(x.shape[: dims[0]]), math.prod(x.shape[dims[0] : -1]), x.shape[-1]
    if tokens < 1 or dim < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must have at least one token and one channel")
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads is {num_heads}; it must divide the stream's {dim} channels")
    levels.check(recompute)
    attentions.check_name(attention)
    _check_parameters(dim, parameters)
    autocast = autocast_dtype(x)
    check_kinds({"x": x}, parameters, autocast is not None)
    width = 0 if parameters.down_weight is None else parameters.down_weight.shape[0]
    problem = SelfAttentionProblem(
        batch, tokens, dim, num_heads, width, Recompute.CHEAP, x.dtype, x.device.type, autocast, attention,
        gpu=x.device.index,
    )  # fmt: skip
    return levels.settle(problem, recompute, x.device)


def _check_parameters(dim: int, p: SelfAttentionParameters) -> None:
    """Raise ValueError unless every parameter has the shape that x's width and the adapter's imply."""
    shapes: dict[str, tuple[int, ...]] = {"norm_weight": (dim,), "norm_bias": (dim,), "qkv_weight": (3 * dim, dim)}
    shapes |= {"proj_weight": (dim, dim), "proj_bias": (dim,)}
    if p.qkv_bias is not None:
        shapes["qkv_bias"] = (3 * dim,)
    for name, shape in shapes.items():
        check_shape(name, getattr(p, name), shape)
    check_adapter(p.adapter._asdict(), dim)


# ---------------------------------------------------------------------------------------------------------------------
# The registered operator


class _SelfAttention(Operator):
    name = "self_attention"
    streams: tuple[str, ...] = ("x",)
    read: int = 1
    options: tuple[str, ...] = ("int num_heads", "float eps")
    outputs: tuple[str, ...] = ("y",)
    composed: tuple[str, ...] = ("eager", "triton")

    def problem(
        self, streams: Sequence[Tensor], flat: Sequence[Tensor | None], options: tuple[Any, ...], recompute: str,
        compute: torch.dtype,
    ) -> SelfAttentionProblem:  # fmt: skip
        x, down = streams[0], self.pack(flat).down_weight
        batch, tokens, dim = x.shape
        return SelfAttentionProblem(
            batch, tokens, dim, options[0], 0 if down is None else down.shape[0], Recompute(recompute), x.dtype,
            x.device.type, None if compute == x.dtype else compute, gpu=x.device.index,
        )  # fmt: skip

    def pack(self, flat: Sequence[Tensor | None]) -> SelfAttentionParameters:
        return SelfAttentionParameters(*flat)  # type: ignore[arg-type]

    def kept(self, kernels: Any, problem: SelfAttentionProblem, recompute: str) -> int:
        return kernels.saved_words(problem)

    def saved_shape(self, streams: Sequence[Tensor], kept: int) -> tuple[int, ...]:
        return (kept,)

    def forward(
        self, kernels: Any, call: Call, streams: Sequence[Tensor], parameters: Any, factors: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        return kernels.forward(call.problem, streams[0], parameters, call.options[1], call.kept > 0)

    def backward(
        self, kernels: Any, call: Call, streams: Sequence[Tensor], parameters: Any, saved: Tensor,
        factors: Sequence[Tensor | None], grads: Sequence[Tensor], wanted: tuple[bool, ...],
    ) -> Sequence[Tensor | None]:  # fmt: skip
        return kernels.backward(call.problem, streams[0], parameters, saved, call.options[1], grads[0], wanted)

    def flops(self, streams: Sequence[Any], flat: Sequence[Any], options: tuple[Any, ...]) -> int:
        batch, tokens, dim = streams[0]
        return 2 * batch * tokens * dim * (4 * dim + 2 * tokens + 2 * flat[6][0])

    def backward_flops(
        self, streams: Sequence[Any], flat: Sequence[Any], options: tuple[Any, ...], wanted: Sequence[bool]
    ) -> int:
        batch, tokens, dim = streams[0]
        adapter = flat[6][0]
        norm, inner = any(wanted[:3]), any(wanted[:5])
        projected = inner or wanted[5] or wanted[6]
        hidden = projected or wanted[7] or wanted[8]
        attention = inner * (dim + 4 * tokens) + wanted[5] * dim + norm * 3 * dim + wanted[3] * 3 * dim
        return 2 * batch * tokens * dim * (attention + adapter * (hidden + projected + wanted[7] + wanted[9]))


OPERATOR = _SelfAttention()
