"""The one list of ways to run an op: ours, taken from the backends that exist, and what people run without us."""

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

#: Device -> levels beside the default one. Memory chooses the default, which is "nothing" wherever memory is not short.
LEVELS = {"cpu": ("cheap", "all"), "cuda": ("nothing", "cheap", "all")}

#: PyTorch's attention kernels by name, on a GPU.
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
#: Other libraries' attention, where installed -> what to import.
PACKAGES = {name: module for name, module in attention.ATTENTIONS.items() if module}
#: Of these and of our backends, what takes 16-bit operands only.
_SIXTEEN_BITS = ("flash", "cudnn", "flash-attn", "cuda")
#: B-CAST at the paper's size, of which a backend is asked whether it runs here at all.
_PAPER = Problem(1, 8, 196, 768, 384, 12, "time", "space", torch.bfloat16, "cpu")


def ours(
    device: str, backward: bool, compute: torch.dtype = torch.bfloat16, op: str = "bcast"
) -> dict[str, dict[str, Any]]:
    """Row -> arguments of our functions and modules. Forward alone repeats nothing, so it has the default only.

    Args:
        device: "cpu" or "cuda".
        backward: whether the row has one.
        compute: of dense products.
        op: that the row is of; one that a backend leaves to another has no row of that backend.
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
    """The arguments of a row of ours, None of any other.

    Raises:
        Unavailable: its backend was not built, or is for another GPU than this device.
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
    """Whether it is a level of recompute of a backend that `auto` takes behind another: in tier `full` only."""
    return name.startswith("cast_kernels, cuda, ")


def is_ours(name: str) -> bool:
    return name.startswith("cast_kernels")


def is_compiled(name: str) -> bool:
    return name.startswith("torch.compile")


def attentions(device: str, compute: torch.dtype) -> tuple[str, ...]:
    """Names of the attention kernels that are compared on a device, besides what PyTorch chooses itself."""
    if device == "cpu":
        return ()
    return tuple(n for n in (*SDPA, *PACKAGES) if compute != torch.float32 or n not in _SIXTEEN_BITS)


def attending(name: str) -> Callable[[], AbstractContextManager[object]]:
    """What forward runs in so that this kernel attends in PyTorch's place; "" leaves the choice to PyTorch.

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
        Unavailable: it cannot be imported.
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
    """PyTorch's attention by one kernel or none; entering costs the host some microseconds a call."""
    with sdpa_kernel(SDPA[name]):
        try:
            yield
        except RuntimeError as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                raise Unavailable(f"PyTorch's {name} kernel does not take this problem: {error}") from None
            raise


class AttentionBy(TorchFunctionMode):
    """Within it, attention in PyTorch's place is another library's, [groups, W, heads, head_dim] each."""

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (x.transpose(1, 2) for x in args)
        return self.attention(q, k, v).transpose(1, 2)


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, for the shapes that it meets."""
    return torch.compile(call, dynamic=False)
