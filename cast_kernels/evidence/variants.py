"""Ways to run B-CAST on a GPU: ours, and what people would run without us."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import cast_kernels
from cast_kernels.evidence.cases import Case, module
from cast_kernels.evidence.machine import Step

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class UnavailableError(RuntimeError):
    """A variant cannot run here; the message says why and what would change it."""


@dataclass(frozen=True)
class Steps:
    """One variant's calls."""

    forward: Step
    training: Step  # forward and backward


class AttentionBy(TorchFunctionMode):
    """Within it, attention in PyTorch's place is another library's, [groups, W, heads, head_dim] each."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (x.transpose(1, 2) for x in args)
        return self.attention(q, k, v).transpose(1, 2)


def steps(
    case: Case, device: torch.device, backend: str, dtype: torch.dtype,
    context: Callable[[], AbstractContextManager[object]] = nullcontext, compiled: bool = False,
    streams: torch.dtype = torch.bfloat16,
) -> Steps:  # fmt: skip
    """A variant's calls on fresh inputs.

    Args:
        case: the problem, in training.
        device: where.
        backend: of the module.
        dtype: of the parameters.
        context: made for each forward.
        compiled: by torch.compile.
        streams: their dtype.
    """
    made: Any = module(case, backend).to(device, dtype)
    if compiled:
        made = torch.compile(made)
    shape = (case.batch, case.frames, case.patches, case.dim)
    spatial = torch.randn(shape[0], shape[1], shape[2] + 1, shape[3], device=device).to(streams).requires_grad_()
    temporal = torch.randn(shape, device=device).to(streams).requires_grad_()
    gradients = [torch.randn_like(spatial), torch.randn_like(temporal)]

    def forward() -> object:
        with torch.no_grad(), context():
            return made(spatial, temporal)

    def training() -> object:
        with context():
            outputs = made(spatial, temporal)
        return torch.autograd.grad(outputs, [spatial, temporal, *made.parameters()], gradients)

    return Steps(forward, training)


def _ours(case: Case, device: torch.device) -> Steps:
    return steps(case, device, "triton", torch.bfloat16)


def _eager(case: Case, device: torch.device) -> Steps:
    return steps(case, device, "eager", torch.bfloat16)


def _amp(backend: str, case: Case, device: torch.device) -> Steps:
    return steps(
        case, device, backend, torch.float32, lambda: torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    )


def _attending(name: str, case: Case, device: torch.device) -> Steps:
    """An expert's self-attention alone, over a whole clip, as `cast_kernels.attention` runs it by this name."""
    tokens, heads = case.frames * case.patches, case.heads
    problem = cast_kernels.SelfAttentionProblem(
        case.batch, tokens, case.dim, heads, 0, cast_kernels.Recompute.CHEAP, torch.bfloat16, device.type
    )
    verdict = cast_kernels.attention.can_run(name, problem)
    if not verdict.ok:
        raise UnavailableError(verdict.reason)
    qkv = torch.randn(case.batch, tokens, 3, heads, case.dim // heads, device=device).bfloat16().requires_grad_()
    gradient = torch.randn(case.batch, tokens, heads, case.dim // heads, device=device).bfloat16()

    def forward() -> object:
        with torch.no_grad():
            return cast_kernels.attention.attend(name, qkv)

    def training() -> object:
        return torch.autograd.grad(cast_kernels.attention.attend(name, qkv), qkv, gradient)

    return Steps(forward, training)


def _compiled(case: Case, device: torch.device) -> Steps:
    return steps(case, device, "eager", torch.bfloat16, compiled=True)


def _xformers(case: Case, device: torch.device) -> Steps:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise UnavailableError(f"xformers: {error}; pip install xformers") from None
    return steps(case, device, "eager", torch.bfloat16, lambda: AttentionBy(memory_efficient_attention))


def _flash(case: Case, device: torch.device) -> Steps:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise UnavailableError(f"flash-attn: {error}; pip install flash-attn") from None
    return steps(case, device, "eager", torch.bfloat16, lambda: AttentionBy(flash_attn_func))


#: Name -> what makes its steps. UnavailableError or BackendError: it cannot run here, and why.
Variants = Mapping[str, Callable[[Case, torch.device], Steps]]
VARIANTS: Variants = {
    "triton": _ours,
    "triton AMP": partial(_amp, "triton"),
    "eager bf16": _eager,
    "eager AMP": partial(_amp, "eager"),
    "torch.compile + SDPA": _compiled,
    "xformers": _xformers,
    "flash-attn": _flash,
    **{f"self-attention by {name}": partial(_attending, name) for name in cast_kernels.attention.ATTENTIONS},
}
#: What a variant raises that cannot run here.
CANNOT_RUN = (UnavailableError, cast_kernels.BackendError)
