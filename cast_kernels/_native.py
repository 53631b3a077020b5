"""The native core, or the reason why there is none."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

# The core links to libgomp.so.1; with torch loaded first it binds to torch's copy: one OpenMP runtime, one thread pool.
import torch  # noqa: F401

#: Written by setup.py beside the compiled module.
RECORD = Path(__file__).with_name("_build.json")

BUILD_COMMAND = "CAST_KERNELS_BUILD_CPU=1 pip install -v --no-deps --force-reinstall ."


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The compiled module `cast_kernels._C`, or None and why it cannot be used."""
    try:
        return importlib.import_module("cast_kernels._C"), ""
    except ImportError as error:
        cause = record().get("cpu", {}).get("reason") or f"cast_kernels._C does not load ({error})"
        return None, f"the native core is not built: {cause}; to build it, run in a checkout: {BUILD_COMMAND}"


def core() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is not built; the message says why and how to build it.
    """
    module, reason = load()
    if module is None:
        raise RuntimeError(reason)
    return module


@functools.cache
def record() -> dict[str, Any]:
    """What setup.py recorded of the build; empty if it never ran."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}
