"""The one list of variants of an op: ours, from the existing backends, and others'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from measure import Unavailable
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import cast_kernels
from cast_kernels import Problem, _native, attention
from cast_kernels.backends import can_run, left_to

#: Device -> levels in addition to the default, which is "nothing" where memory is not short, else "cheap".
LEVELS = {"cpu": ("cheap", "all"), "cuda": ("nothing", "cheap", "all")}

#: PyTorch's attention kernels by name, on a GPU.
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
#: Other libraries' attention, if installed -> module to import.
PACKAGES = {name: module for name, module in attention.ATTENTIONS.items() if module}
#: Of these and of our backends, those that take only 16-bit operands.
_SIXTEEN_BITS = ("flash", "cudnn", "flash-attn", "cuda")
#: B-CAST at the paper's size, to ask a backend whether it runs here at all.
_PAPER = Problem(1, 8, 196, 768, 384, 12, "time", "space", torch.bfloat16, "cpu")


def ours(
    device: str, backward: bool, compute: torch.dtype = torch.bfloat16, op: str = "bcast"
) -> dict[str, dict[str, Any]]:
    """Row -> arguments of our functions and modules. Forward alone recomputes nothing, so it has only the default.

    Args:
        device: "cpu" or "cuda".
        backward: whether the row has a backward.
        compute: of dense products.
        op: the row's op. If a backend leaves it to another, that backend has no row.
    """
    rows: dict[str, dict[str, Any]] = {}
    for backend in cast_kernels.backends.BACKENDS:
        if backend == "eager" or (backend == "cpu") != (device == "cpu") or left_to(backend, op):
            continue
        if compute == torch.float32 and backend in _SIXTEEN_BITS:
            continue
        name = f"cast_kernels, {backend}"
        rows[name] = {"backend": backend}
        if backward:
            rows |= {f"{name}, recompute={r}": {"backend": backend, "recompute": r} for r in LEVELS[device]}
    return rows


def options_of(name: str, device: torch.device) -> dict[str, Any] | None:
    """The arguments of one of our rows; None for any other.

    Raises:
        Unavailable: its backend was not built, or needs another GPU.
    """
    rows = {row: options for kind in ("cpu", "cuda") for row, options in ours(kind, True).items()}
    backend = rows[name]["backend"] if name in rows else ""
    if backend == "cpu" and _native.CORE is None:
        raise Unavailable(_native.REASON)
    if backend == "cuda":
        verdict = can_run(backend, replace(_PAPER, device=device.type, gpu=device.index))
        if not verdict.ok:
            raise Unavailable(verdict.reason)
    return rows.get(name)


def is_second(name: str) -> bool:
    """Whether it is a recompute level of a backend that `auto` does not prefer. Such rows are only in tier `full`."""
    return name.startswith("cast_kernels, cuda, ")


def is_ours(name: str) -> bool:
    return name.startswith("cast_kernels")


def is_compiled(name: str) -> bool:
    return name.startswith("torch.compile")


def attentions(device: str, compute: torch.dtype) -> tuple[str, ...]:
    """Names of the attention kernels to compare on a device, in addition to PyTorch's own choice."""
    if device == "cpu":
        return ()
    return tuple(n for n in (*SDPA, *PACKAGES) if compute != torch.float32 or n not in _SIXTEEN_BITS)


def attending(name: str) -> Callable[[], AbstractContextManager[object]]:
    """A context of forward in which this kernel replaces PyTorch's attention; "" leaves the choice to PyTorch.

    Raises:
        Unavailable: the package is not installed.
    """
    if not name:
        return nullcontext
    if name in SDPA:
        return lambda: _only(name)
    function = package_attention(name)
    return lambda: AttentionBy(function)


def package_attention(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Another library's attention of q, k, v [groups, W, heads, head_dim].

    Raises:
        Unavailable: the package cannot be imported.
    """
    try:
        if name == "xformers":
            from xformers.ops import memory_efficient_attention as function
        else:
            from flash_attn import flash_attn_func as function
    except ImportError as error:
        raise Unavailable(f"{name} cannot be imported: {error}; pip install {name}") from None
    return function


@contextmanager
def _only(name: str) -> Iterator[None]:
    """PyTorch's attention by this kernel or an error. Entering takes some microseconds of the host for each call."""
    with sdpa_kernel(SDPA[name]):
        try:
            yield
        except RuntimeError as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                raise Unavailable(f"PyTorch's {name} kernel does not take this problem: {error}") from None
            raise


class AttentionBy(TorchFunctionMode):
    """While active, another library's attention replaces PyTorch's, on [groups, heads, W, head_dim] each."""

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (x.transpose(1, 2) for x in args)
        return self.attention(q, k, v).transpose(1, 2)


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call compiled by torch.compile, for the shapes that occur."""
    return torch.compile(call, dynamic=False)
