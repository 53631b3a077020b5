"""What every op of backend `triton` shares: whether it can run here, and which GPU it runs on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from cast_kernels.compiling import constant
from cast_kernels.problem import (
    AdapterParameters,
    FFNParameters,
    ProjectionParameters,
    SelfAttentionParameters,
    Verdict,
)
from cast_kernels.versions import FENCED_TRITON, release, too_old

Parameters = TypeVar("Parameters", FFNParameters, SelfAttentionParameters, AdapterParameters, ProjectionParameters)

#: Dtypes of streams and of dense products. float32 runs as three tf32 products.
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Widest stream that LayerNorm takes: a row of it, as a power of two in fp32, must fit in a program's registers.
WIDEST_STREAM = 4096
_HERE: AbstractContextManager[object] = nullcontext()
#: Compute capability of the first NVIDIA GPUs with bfloat16 and tf32 on tensor cores, and asynchronous copies.
OLDEST = (8, 0)


def verdict(device: str, gpu: int | None, dtype: torch.dtype, compute: torch.dtype) -> Verdict:
    """Whether Triton runs kernels on tensors of this device and these dtypes, and the reason in words either way.

    Args:
        device: type of the tensors' device.
        gpu: the number of their GPU, None for the current one.
        dtype: of the streams.
        compute: of dense products.
    """
    for what, found in (("streams are", dtype), ("compute dtype is", compute)):
        if found not in COMPUTE_DTYPES:
            return Verdict(False, f"the {what} {found}; Triton kernels take {', '.join(map(str, COMPUTE_DTYPES))}")
    if device == "cuda":
        return _on_gpu(gpu)
    if device == "cpu" and interpreting():
        fault = _cannot_use_triton()
        return Verdict(not fault, fault or "Triton's interpreter (TRITON_INTERPRET=1): for tests, it models no GPU")
    if device == "cpu" and emulating():
        return Verdict(True, "an emulated GPU stands in for the driver")
    return Verdict(False, f"the streams are on {device}; Triton kernels run on cuda")


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def emulating() -> bool:
    """Whether a driver that takes CPU tensors is active. Triton is not imported to find out."""
    driver = sys.modules.get("triton.runtime.driver")
    if driver is None:
        return False
    return bool(getattr(getattr(driver.driver, "_active", None), "runs_on_cpu", False))


@constant
def _cannot_use_triton() -> str:
    """Why Triton cannot be used, with what to do; "" if it can. Imports it."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}; pip install triton"
    return too_old("triton", triton.__version__)


@constant
def _triton() -> str:
    """Triton's version, and what is known against it."""
    import triton

    if release(triton.__version__) >= FENCED_TRITON:
        return f"Triton {triton.__version__}"
    fenced = ".".join(map(str, FENCED_TRITON))
    return (
        f"Triton {triton.__version__}, which on sm_90 and newer leaves out fences that PTX asks for between copies and "
        f"products; {fenced} has them (docs/versions.md)"
    )


def _on_gpu(gpu: int | None) -> Verdict:
    fault = _cannot_use_triton()
    if fault:
        return Verdict(False, fault)
    if torch.cuda.is_available() and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(gpu)
        if (major, minor) < OLDEST:
            oldest, which = "".join(map(str, OLDEST)), "the GPU" if gpu is None else f"cuda:{gpu}"
            return Verdict(False, f"{which} is sm_{major}{minor}; the kernels need sm_{oldest} or newer")
    return Verdict(True, _triton())


# Modules that import Triton, at their first use. An import statement in a function takes 0.7 us at every call.


@cache
def norms() -> ModuleType:
    """LayerNorm's kernels."""
    from cast_kernels.triton import norm

    return norm


@cache
def activations() -> ModuleType:
    """The activation's kernels."""
    from cast_kernels.triton import activation

    return activation


@cache
def adapter_plans() -> ModuleType:
    """The adapter's plans."""
    from cast_kernels.triton import adapter_plan

    return adapter_plan


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current: Triton launches on the current device and its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else _HERE


def exactly() -> AbstractContextManager[object]:
    """No autocast inside: operands have the dtypes that they are to have. `torch.autocast` takes 7 us, this 1."""
    return torch._C._DisableAutocast()


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without the call where nothing is to be done: that is 1 us."""
    return x if x.dtype == dtype else x.to(dtype)


def cast_fields(parameters: Parameters, names: Iterable[str], dtype: torch.dtype) -> Parameters:
    """The same parameters with the named ones in `dtype` and contiguous; one launch makes all copies that this takes.

    Copies live as long as the result: a weight that changes is read anew by the next call.
    """
    other, given = [], []
    for name in names:
        t = getattr(parameters, name)
        if t.dtype != dtype or not t.is_contiguous():
            other.append(name)
            given.append(t)
    if not other:
        return parameters
    copies = [torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format) for t in given]
    torch._foreach_copy_(copies, given)
    return parameters._replace(**dict(zip(other, copies, strict=True)))


def architecture() -> str:
    """The GPU that kernels are compiled for, as the tile tables name it: "sm_90", "gfx942"."""
    if interpreting():
        return "interpreter"
    from triton.runtime.driver import driver

    arch = driver.active.get_current_target().arch
    return arch if isinstance(arch, str) else f"sm_{arch}"
