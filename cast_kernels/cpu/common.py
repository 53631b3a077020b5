"""What every op of backend `cpu` shares: whether the native core can run, and addresses of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cast_kernels import _native
from cast_kernels.problem import Verdict


def verdict(
    device: str, dtype: torch.dtype, autocast: torch.dtype | None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> Verdict:
    """Whether the native core runs streams of this device and dtype, and the reason in words either way.

    Args:
        device, dtype, autocast: the problem's.
        dtypes: those that the op takes outside of autocast.

    Raises:
        ValueError: CAST_KERNELS_CPU_ISA names no instruction-set level.
    """
    if device not in ("cpu", "meta"):
        return Verdict(False, f"the streams are on {device}; the native core runs on cpu")
    if autocast is None and dtype not in dtypes:
        return Verdict(False, f"the streams are {dtype}; the native core takes {' and '.join(map(str, dtypes))}")
    if _native.CORE is None:
        return Verdict(False, _native.REASON)
    if _native.ISA_ERROR:
        raise ValueError(_native.ISA_ERROR)
    return Verdict(True, f"native core, {_native.ISA} instructions")


class Addresses:
    """Addresses of contiguous float32 versions of tensors, kept alive as long as this object.

    `upcast` allows bfloat16 and float16, which become float32 without loss; otherwise another dtype is an error.
    """

    def __init__(self, upcast: bool = False) -> None:
        self._alive: list[Tensor] = []
        self._upcast = upcast

    def __call__(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        tensor = tensor.detach().contiguous()
        if self._upcast and tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.float()
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise TypeError(f"the native core takes torch.float32 on cpu, not {tensor.dtype} on {tensor.device}")
        self._alive.append(tensor)
        return tensor.data_ptr()


def float32(shape: Sequence[int]) -> Tensor:
    """Uninitialised float32 on the CPU, whatever the defaults of dtype and device."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def zeros(shape: Sequence[int]) -> Tensor:
    """Zeros in float32 on the CPU, whatever the defaults of dtype and device."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")
