"""The one list of ways to run an op: ours, taken from the backends that exist, and what people run without us."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from measure import Unavailable
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import cast_kernels
from cast_kernels import _native, attention

#: Device -> levels beside the default one, which is "cheap" on a CPU and on a GPU chosen by memory.
LEVELS = {"cpu": ("nothing", "all"), "cuda": ("nothing", "cheap", "all")}

#: PyTorch's attention kernels by name, on a GPU.
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
#: Other libraries' attention, where installed -> what to import.
PACKAGES = {name: module for name, module in attention.ATTENTIONS.items() if module}
#: Of these, what takes 16-bit operands only.
_SIXTEEN_BITS = ("flash", "cudnn", "flash-attn")


#: Backends without rows yet: the rehearsal takes Triton's launches, not those of the CUDA kernels.
UNTIMED = ("cuda",)


def ours(device: str, backward: bool) -> dict[str, dict[str, Any]]:
    """Row -> arguments of our functions and modules. Forward alone repeats nothing, so it has the default only."""
    rows: dict[str, dict[str, Any]] = {}
    for backend in cast_kernels.backends.BACKENDS:
        if backend in ("eager", *UNTIMED) or (backend == "cpu") != (device == "cpu"):
            continue
        name = f"cast_kernels, {backend}"
        rows[name] = {"backend": backend}
        if backward:
            rows |= {f"{name}, recompute={r}": {"backend": backend, "recompute": r} for r in LEVELS[device]}
    return rows


def options_of(name: str) -> dict[str, Any] | None:
    """The arguments of a row of ours, None of any other.

    Raises:
        Unavailable: its backend was not built.
    """
    rows = {row: options for device in ("cpu", "cuda") for row, options in ours(device, True).items()}
    if name in rows and rows[name]["backend"] == "cpu" and _native.CORE is None:
        raise Unavailable(_native.REASON)
    return rows.get(name)


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
