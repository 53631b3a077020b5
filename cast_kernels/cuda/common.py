"""What every op of backend `cuda` shares: whether its kernels run here, memory, and addresses of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

from cast_kernels import _native
from cast_kernels.compiling import constant
from cast_kernels.problem import Recompute, Verdict

#: What products read; streams and parameters are of the same dtype or float32.
COMPUTE_DTYPES = (torch.bfloat16, torch.float16)
#: Types of the tensors that the module reads: their memory is what it seems.
TYPES = (Tensor, nn.Parameter)
#: Names of dtypes in csrc/cuda/launch.h, in its order.
NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
#: Recompute in csrc/cuda/bcast.h; "" is where no backward will follow.
RECOMPUTE_CODES: dict[str, int] = {Recompute.NOTHING: 0, Recompute.CHEAP: 1, Recompute.ALL: 2, "": 3}
#: What the copies of the kernels take: addresses are multiples of it.
ALIGNMENT = 16
#: The GPU that the kernels are written for. Code of sm_90a runs on no other.
CAPABILITY = (9, 0)
#: Multiprocessors of an H100, where launches are recorded and no GPU is there.
RECORDED_MULTIPROCESSORS = 132

Found = TypeVar("Found")
#: A tensor, or one that may be absent.
AnyTensor = TypeVar("AnyTensor", Tensor, Tensor | None)
_HERE: AbstractContextManager[object] = nullcontext()


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
    """Make the tensor's GPU current, unless it is: launches go there."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def stream(x: Tensor) -> int:
    """Handle of the current stream of the tensor's GPU, whose context this thread then has."""
    if not x.is_cuda:
        return 0
    kernels().make_current(x.device.index)
    return torch._C._cuda_getCurrentRawStream(x.device.index)


def multiprocessors(gpu: int) -> int:
    """Of the GPU of this number; -1 where launches are recorded."""
    if gpu < 0:
        return RECORDED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(gpu).multi_processor_count)


def memory(like: Tensor, size: int) -> Tensor:
    """So many uninitialised bytes on the tensor's device."""
    return like.new_empty(size, dtype=torch.uint8)


def read_as(dtype: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """As what kernels read a dtype: as the compute dtype if it is that, else as float32, which holds its values."""
    return compute if dtype == compute else torch.float32


def together(tensors: Sequence[AnyTensor], compute: torch.dtype) -> tuple[AnyTensor, ...]:
    """The tensors :func:`readable`, all of the compute dtype, or all of float32."""
    narrow = {x.dtype for x in tensors if x is not None} <= {compute}
    return tuple(readable(x, compute if narrow else torch.float32) for x in tensors)


def readable(x: AnyTensor, dtype: torch.dtype) -> AnyTensor:
    """The tensor as kernels read it, mostly itself: contiguous, of the dtype, at an address that copies take."""
    if x is None:
        return x
    x = x.to(dtype).contiguous()
    x = x if type(x) in TYPES else x.as_subclass(Tensor)
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def must(found: Found | None) -> Found:
    """What was found with tensors that are readable.

    Raises:
        RuntimeError: the module takes them for something else.
    """
    if found is None:
        raise RuntimeError("the CUDA kernels read tensors that are contiguous, of one dtype and aligned; these are not")
    return found


def _read_tensors() -> bool:
    """Tell the module how tensors are read; whether by DLPack's table, which takes a fifth of the time."""
    names = ("__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__")  # of releases until 2.10, too
    table = next((found for name in names if (found := getattr(Tensor, name, None)) is not None), None)
    return kernels().read_tensors_by(table, TYPES, tuple(NUMBERS))


#: Whether this PyTorch has DLPack's table of functions.
HAS_TABLE = _native.CUDA is not None and _read_tensors()
