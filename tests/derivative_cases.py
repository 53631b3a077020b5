"""Small calls of every op as functions of their tensors, for the tests of PyTorch's transforms on any backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import adapter_cases
import bcast_cases
import ffn_cases
import self_attention_cases
import torch
from torch import Tensor

import cast_kernels

#: Sizes that every backend takes.
_BCAST = bcast_cases.small(batch=2, frames=2, patches=3, dim=16, bottleneck=16, heads=1, seed=40)
_ATTENTION = self_attention_cases.Case(batch=2, tokens=3, dim=16, heads=2, adapter=16, seed=41)
_FFN = ffn_cases.Case(lead=(2, 3), dim=16, hidden=16, adapter=16, activation="quick_gelu", seed=42)
_ADAPTER = adapter_cases.Case(lead=(2, 3), dim=16, adapter=16, skip=True, seed=43)


@dataclass(frozen=True)
class Call:
    """An op: its random tensors in a dtype, streams first, and its outputs as a function of them."""

    streams: int
    tensors: Callable[[torch.dtype], list[Tensor]]
    run: Callable[..., tuple[Tensor, ...]]

    def function(self, backend: str, attention: str = "auto") -> Callable[..., tuple[Tensor, ...]]:
        return lambda *tensors: self.run(backend, attention, *tensors)

    def loss(self, backend: str, attention: str = "auto") -> Callable[..., Tensor]:
        """A number that is quadratic in every output."""
        call = self.function(backend, attention)
        return lambda *tensors: sum(y.square().sum() for y in call(*tensors))  # type: ignore[return-value]


def _bcast(backend: str, attention: str, spatial: Tensor, temporal: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
    parameters = cast_kernels.Parameters.from_flat(flat)
    return cast_kernels.bcast(
        spatial, temporal, parameters, num_heads=_BCAST.heads, backend=backend, attention=attention
    )


def _self_attention(backend: str, attention: str, x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
    parameters = cast_kernels.SelfAttentionParameters(*flat)
    options = {"num_heads": _ATTENTION.heads, "eps": 1e-5, "backend": backend, "attention": attention}
    return (cast_kernels.self_attention(x, parameters, **options),)  # type: ignore[arg-type]


def _ffn(backend: str, _: str, x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
    parameters = cast_kernels.FFNParameters(*flat)
    return (cast_kernels.ffn(x, parameters, activation=_FFN.activation, eps=1e-5, backend=backend),)


def _adapter(backend: str, _: str, x: Tensor, residual: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
    parameters = cast_kernels.AdapterParameters(*flat)
    return (cast_kernels.adapter(x, parameters, residual=residual, skip=True, scale=0.5, backend=backend),)


def _tensors_of_bcast(dtype: torch.dtype) -> list[Tensor]:
    flat = [p for p in _BCAST.module(dtype).gathered().flat() if p is not None]
    return [x.detach() for x in (*_BCAST.inputs(dtype), *flat)]


CALLS = {
    "bcast": Call(2, _tensors_of_bcast, _bcast),
    "self_attention": Call(1, lambda dtype: [_ATTENTION.x(dtype), *_ATTENTION.parameters(dtype)], _self_attention),
    "ffn": Call(1, lambda dtype: [_FFN.x(dtype), *_FFN.parameters(dtype)], _ffn),
    "adapter": Call(
        2,
        lambda dtype: [_ADAPTER.stream("x", dtype), _ADAPTER.stream("residual", dtype), *_ADAPTER.parameters(dtype)],
        _adapter,
    ),
}
#: What runs in a registered operator where.
KERNELS = [("cpu", "bcast"), ("cpu", "self_attention"), ("cpu", "ffn")]
