"""Shared by every op of backend `cpu`: whether the native core can run, memory, and addresses of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cast_kernels import _native
from cast_kernels.problem import Recompute, Verdict

#: Dtypes of streams and parameters; bfloat16 inputs are widened, bfloat16 results are rounded once.
DTYPES = (torch.float32, torch.bfloat16)

#: Recompute in csrc/cpu/base.h.
RECOMPUTE_CODES: dict[str, int] = {Recompute.NOTHING: 0, Recompute.CHEAP: 1, Recompute.ALL: 2}


def verdict(device: str, dtype: torch.dtype, autocast: torch.dtype | None) -> Verdict:
    """Whether the native core runs streams of this device and dtype, and why or why not.

    Raises:
        ValueError: CAST_KERNELS_CPU_ISA names no instruction-set level.
    """
    if device not in ("cpu", "meta"):
        return Verdict(False, f"the streams are on {device}; the native core runs on cpu")
    if autocast is None and dtype not in DTYPES:
        return Verdict(False, f"the streams are {dtype}; the native core takes {' and '.join(map(str, DTYPES))}")
    if _native.CORE is None:
        return Verdict(False, _native.REASON)
    if _native.ISA_ERROR:
        raise ValueError(_native.ISA_ERROR)
    return Verdict(True, f"native core, {_native.ISA} instructions")


def float32(shape: Sequence[int]) -> Tensor:
    """Uninitialised float32 memory on the CPU, whatever the process's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def zeros(shape: Sequence[int]) -> Tensor:
    """The same, zeroed."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


class Addresses:
    """Addresses of contiguous float32 versions of tensors, kept alive as long as this object."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []

    def __call__(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        if tensor.numel() and not tensor.data_ptr():
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} has no memory: it was freed, as sharding (FSDP) and "
                "offloading free weights between calls; call the module that gathers it, or load it again"
            )
        tensor = tensor.detach().to(torch.float32).contiguous()
        if tensor.device.type != "cpu":
            raise TypeError(f"the native core takes tensors on cpu, not on {tensor.device}")
        self._alive.append(tensor)
        return tensor.data_ptr()
