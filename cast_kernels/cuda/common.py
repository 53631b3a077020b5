"""What every op of backend `cuda` shares: whether its kernels run here, memory, and addresses of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, reduce
from operator import attrgetter, or_
from types import ModuleType

import torch
from torch import Tensor

from cast_kernels import _native
from cast_kernels.compiling import constant
from cast_kernels.problem import Recompute, Verdict

#: What products read; streams and parameters are of the same dtype or float32.
COMPUTE_DTYPES = (torch.bfloat16, torch.float16)
#: Names of dtypes in csrc/cuda/launch.h.
NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
#: Recompute in csrc/cuda/bcast.h; "" is where no backward will follow.
RECOMPUTE_CODES: dict[str, int] = {Recompute.NOTHING: 0, Recompute.CHEAP: 1, Recompute.ALL: 2, "": 3}
#: What the copies of the kernels take: addresses are multiples of it.
ALIGNMENT = 16
#: The GPU that the kernels are written for. Code of sm_90a runs on no other.
CAPABILITY = (9, 0)
#: Multiprocessors of an H100, where launches are recorded and no GPU is there.
RECORDED_MULTIPROCESSORS = 132

_HERE: AbstractContextManager[object] = nullcontext()
_DTYPE = attrgetter("dtype")


def kernels() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is not built; the message says why and how to build it.
    """
    if _native.CUDA is None:
        raise RuntimeError(_native.CUDA_REASON)
    return _native.CUDA


@constant
def recorded() -> bool:
    """Whether launches go to a recorder in place of the driver: then the kernels take tensors on the CPU."""
    return _native.CUDA is not None and bool(_native.CUDA.is_recorded())


def verdict(device: str, dtype: torch.dtype, compute: torch.dtype) -> Verdict:
    """Whether the kernels run on tensors of this device, if its GPU is the right one, and of these dtypes, and why.

    Args:
        device: type of the tensors' device.
        dtype: of the streams.
        compute: of dense products.
    """
    if _native.CUDA is None:
        return Verdict(False, _native.CUDA_REASON)
    if compute not in COMPUTE_DTYPES:
        return Verdict(
            False, f"the compute dtype is {compute}; the kernels take {_listed(COMPUTE_DTYPES)}: run under "
            "torch.autocast, or convert streams and parameters"
        )  # fmt: skip
    if dtype not in (compute, torch.float32):
        return Verdict(
            False, f"the streams are {dtype} where products are of {compute}; {_listed((compute, torch.float32))} are "
            "possible: convert the streams, or leave autocast out"
        )  # fmt: skip
    if device == "cuda" and recorded():
        return Verdict(False, "launches are recorded, and a recorder reads the memory of tensors on the CPU alone")
    if device == "cuda":
        return _on_gpu()
    if device == "cpu" and recorded():
        return Verdict(True, "launches are recorded; no GPU runs them")
    return Verdict(False, f"the streams are on {device}; the CUDA kernels run on cuda, on GPUs of sm_90 (H100, H200)")


def _listed(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(str, dtypes))


@constant
def other_gpu(gpu: int | None) -> str:
    """Why this GPU is none for which the kernels are written; "" if it is one, or if none is here."""
    if torch.version.hip is not None:
        return "PyTorch is built for AMD's GPUs; the CUDA kernels are for NVIDIA's sm_90 (H100, H200)"
    if not torch.cuda.is_available() or (found := torch.cuda.get_device_capability(gpu)) == CAPABILITY:
        return ""
    which = "the GPU" if gpu is None else f"cuda:{gpu}"
    return f"{which} is sm_{found[0]}{found[1]}; the CUDA kernels are for sm_90 (H100, H200) alone"


@constant
def _on_gpu() -> Verdict:
    version, reason = kernels().driver()
    if reason:
        return Verdict(False, reason)
    toolkit = kernels().toolkit()
    if version // 1000 < toolkit // 1000:
        return Verdict(
            False, f"the driver is of CUDA {_release(version)}, the kernels were built by {_release(toolkit)}: install "
            f"a driver of CUDA {toolkit // 1000}, or build them with an older toolkit"
        )  # fmt: skip
    return Verdict(True, f"CUDA C++ for sm_90, driver of CUDA {_release(version)}")


def _release(version: int) -> str:
    """As the driver numbers it: 12040 is 12.4."""
    return f"{version // 1000}.{version % 1000 // 10}"


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current: launches go there."""
    return torch.cuda.device(x.device) if x.is_cuda else _HERE


def stream(x: Tensor) -> int:
    """Handle of the current stream of the tensor's GPU, whose context this thread then has."""
    if not x.is_cuda:
        return 0
    kernels().make_current(x.device.index)
    return torch._C._cuda_getCurrentRawStream(x.device.index)


def multiprocessors(x: Tensor) -> int:
    """Of the tensor's GPU."""
    return _multiprocessors(x.device.index) if x.is_cuda else RECORDED_MULTIPROCESSORS


@lru_cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def memory(like: Tensor, size: int) -> Tensor:
    """So many uninitialised bytes on the tensor's device."""
    return like.new_empty(size, dtype=torch.uint8)


def address(x: Tensor | None) -> int:
    """Of a tensor, 0 of None."""
    return 0 if x is None else x.data_ptr()


def dtype_of(tensors: Sequence[Tensor], compute: torch.dtype) -> torch.dtype:
    """In which kernels read these tensors: the compute dtype if all are of it, else float32, which holds them all."""
    return compute if set(map(_DTYPE, tensors)) <= {compute} else torch.float32


def as_read(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Sequence[Tensor], list[int]]:
    """The tensors as kernels read them, and their addresses: contiguous, of the dtype, at addresses that copies take.

    Mostly they are so already; this is on the way of every call, and looks at all of them at once.
    """
    if set(map(_DTYPE, tensors)) != {dtype} or not all(map(Tensor.is_contiguous, tensors)):
        tensors = [x.to(dtype).contiguous() for x in tensors]
    addresses = list(map(Tensor.data_ptr, tensors))
    if reduce(or_, addresses, 0) % ALIGNMENT:
        tensors = [x.clone() if x.data_ptr() % ALIGNMENT else x for x in tensors]
        addresses = list(map(Tensor.data_ptr, tensors))
    return tensors, addresses
