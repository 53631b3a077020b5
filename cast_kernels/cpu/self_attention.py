"""Backend `cpu`: self-attention with its serial adapter in native C++, forward and backward.

Streams and weights are float32 or bfloat16. The core computes in float32; bfloat16 is widened here, without loss, and
each result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cast_kernels import _native
from cast_kernels.cpu.common import RECOMPUTE_CODES, Addresses, float32, verdict, zeros
from cast_kernels.problem import Recompute, SelfAttentionParameters, SelfAttentionProblem, Verdict


def can_run(problem: SelfAttentionProblem) -> Verdict:
    """Whether the native core can run the problem, and why or why not.

    Raises:
        ValueError: CAST_KERNELS_CPU_ISA names no instruction-set level.
    """
    if problem.attention != "auto":
        return Verdict(False, f"attention={problem.attention!r} was asked for; the native core attends itself")
    return verdict(problem.device, problem.dtype, problem.autocast)


def saved_words(problem: SelfAttentionProblem) -> int:
    """Floats that backward needs; `csrc/cpu/self_attention.h` lays them out. Sizes may be symbolic."""
    dim, adapter = problem.dim, problem.adapter
    row = dim + 2 * problem.num_heads + 2
    if problem.recompute is not Recompute.ALL:
        row += 3 * dim
    if problem.recompute is Recompute.NOTHING and adapter:
        row += dim + adapter
    return problem.batch * problem.tokens * row + 16 * max(dim, adapter) + 64


def forward(
    problem: SelfAttentionProblem,
    x: Tensor,
    parameters: SelfAttentionParameters,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The stream with attention and adapter added, and `saved` for backward.

    Args:
        problem: the sizes.
        x: [batch, tokens, D], any strides, as are all tensors here.
        parameters: as :class:`~cast_kernels.problem.SelfAttentionParameters` describes.
        eps: LayerNorm epsilon.
        save: whether backward will follow.

    Returns:
        [batch, tokens, D] in the dtype of `x`, and `saved` [saved_words] (or [0]), float32.
    """
    core, inputs = _native.core(), Addresses()
    native = _native_problem(core, problem, eps)
    y = float32(x.shape)
    # An empty batch runs no kernel, so nothing would write the slack that every `saved` has.
    saved = (zeros if problem.batch == 0 else float32)((saved_words(problem) if save else 0,))
    core.self_attention_forward(
        native, inputs(x), [inputs(p) for p in parameters], y.data_ptr(), saved.data_ptr() if save else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return y.to(x.dtype), saved


def backward(
    problem: SelfAttentionProblem,
    x: Tensor,
    parameters: SelfAttentionParameters,
    saved: Tensor,
    eps: float,
    grad_y: Tensor,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of x and the ten parameters, None where not wanted, each in its tensor's dtype.

    Args:
        saved: from :func:`forward` with `save`.
        grad_y: [batch, tokens, D].
        wanted: for x and each field of the parameters, whether to compute it.

    The other arguments are those of :func:`forward`.
    """
    core, inputs = _native.core(), Addresses()
    make = zeros if problem.batch == 0 else float32  # without rows the core writes nothing
    primals = [x, *parameters]
    grads = [make(p.shape) if want and p is not None else None for p, want in zip(primals, wanted, strict=True)]
    addresses = [0 if g is None else g.data_ptr() for g in grads]
    core.self_attention_backward(
        _native_problem(core, problem, eps), inputs(x), [inputs(p) for p in parameters], inputs(saved), inputs(grad_y),
        addresses[0], addresses[1:], torch.get_num_threads(),
    )  # fmt: skip
    return [g if g is None or p is None else g.to(p.dtype) for g, p in zip(grads, primals, strict=True)]


def _native_problem(core: Any, problem: SelfAttentionProblem, eps: float) -> Any:
    native = core.SelfAttentionProblem(
        problem.batch, problem.tokens, problem.dim, problem.num_heads, problem.adapter,
        RECOMPUTE_CODES[problem.recompute], eps, problem.bf16,
    )  # fmt: skip
    assert core.self_attention_saved(native) == saved_words(problem), "the two sides disagree about `saved`"
    return native
