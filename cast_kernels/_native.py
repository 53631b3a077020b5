"""The native core and the CUDA kernels, or the reason that one is missing.

Both are decided once, at import, so that torch.compile sees constants.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

# The core links to libgomp.so.1; with torch loaded first it binds to torch's copy: one OpenMP runtime, one thread pool.
import torch  # noqa: F401

BUILD_COMMAND = "CAST_KERNELS_BUILD_CPU=1 pip install -v --no-deps --force-reinstall ."
CUDA_BUILD_COMMAND = (
    "pip install '.[cuda-build]' && CAST_KERNELS_BUILD_CUDA=1 pip install -v --no-deps --force-reinstall ."
)


def _read_record() -> dict[str, Any]:
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.is_file() else {}


def _load() -> tuple[ModuleType | None, str]:
    try:
        import cast_kernels._C as core
    except ImportError as error:
        cause = RECORD.get("cpu", {}).get("reason") or f"cast_kernels._C does not load ({error}){_others('_C')}"
        return None, f"the native core is not built: {cause}; to build it, run in a checkout: {BUILD_COMMAND}"
    return core, ""


def _load_cuda() -> tuple[ModuleType | None, str]:
    try:
        import cast_kernels._cuda as kernels
    except ImportError as error:
        cause = RECORD.get("cuda", {}).get("reason") or f"cast_kernels._cuda does not load ({error}){_others('_cuda')}"
        return None, f"the CUDA kernels are not built: {cause}; to build them, run in a checkout: {CUDA_BUILD_COMMAND}"
    return kernels, ""


def _others(module: str) -> str:
    """A clause about modules here that another Python's build made."""
    ours = {f"{module}{suffix}" for suffix in EXTENSION_SUFFIXES}
    found = sorted({path.name for path in Path(__file__).parent.glob(f"{module}.*")} - ours)
    return f"; {', '.join(found)} is not for this Python, {sys.implementation.cache_tag}" if found else ""


def _isa() -> tuple[str, str]:
    try:
        return (CORE.isa() if CORE is not None else ""), ""
    except ValueError as error:
        return "", str(error)


#: setup.py's record of the build; empty if it never ran.
RECORD: dict[str, Any] = _read_record()

#: The compiled module `cast_kernels._C`, or None and why it cannot be used.
CORE, REASON = _load()

#: The compiled module `cast_kernels._cuda`, or None and why it cannot be used. It needs no driver to be imported.
CUDA, CUDA_REASON = _load_cuda()

#: The instruction-set level in use, or "" and why there is none (CAST_KERNELS_CPU_ISA names no level).
ISA, ISA_ERROR = _isa()


def core() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is not built; the message says why and how to build it.
    """
    if CORE is None:
        raise RuntimeError(REASON)
    return CORE


def cuda() -> ModuleType:
    """The CUDA kernels.

    Raises:
        RuntimeError: they are not built; the message says why and how to build them.
    """
    if CUDA is None:
        raise RuntimeError(CUDA_REASON)
    return CUDA
