"""Runs a program, a file or a module, under a checker as Python would run it."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import ptx_emulator
from ptx_emulator.triton.checker import Checker, checking

#: What PyTorch says where a program asks for a GPU and there is none.
_NO_GPU = ("Torch not compiled with CUDA", "Found no NVIDIA driver", "No CUDA GPUs are available", "CUDA driver")
_ADVICE = (
    "ptx_emulator: the program asks for a CUDA device, and kernels run here on CPU tensors. Take the device from "
    "triton.runtime.driver.active.get_active_torch_device(), which is cpu here and the GPU on a GPU, or add "
    "--device-as-cpu"
)


def run_program(
    checker: Checker, module: str | None, script: str, words: list[str], cache: Path | None, device_as_cpu: bool
) -> int:
    """Run the program -> its exit status.

    Args:
        checker: collects what is found.
        module: name of a module, or None for a script.
        script: path of a file.
        words: the program's arguments.
        cache: folder of compiled kernels; None: Triton's own.
        device_as_cpu: read "cuda" as "cpu" in calls of PyTorch.
    """
    devices: Any = DeviceAsCpu() if device_as_cpu else nullcontext()
    with _as_main(module, script, words), checking(checker, cache), devices:
        try:
            if module is None:
                checker.script = os.path.abspath(script)
                runpy.run_path(script, run_name="__main__")
            else:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            return _status(stop)
        except Exception as error:
            _print(error)
            return 1
    return 0


@contextmanager
def _as_main(module: str | None, script: str, words: list[str]) -> Iterator[None]:
    """`sys.argv` and the first folder of `sys.path` as Python sets them for a program."""
    before = sys.argv, sys.path[:]
    sys.argv = [script or str(module), *words]
    sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.abspath(script))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before


def _status(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def _print(error: Exception) -> None:
    """The traceback from the program's first line on, and advice where it wants a GPU."""
    ours = (str(Path(str(ptx_emulator.__file__)).parent), runpy.__file__, "<frozen runpy>")
    at: TracebackType | None = error.__traceback__
    while at is not None and at.tb_frame.f_code.co_filename.startswith(ours):
        at = at.tb_next
    traceback.print_exception(type(error), error, at)
    if any(text in str(error) for text in _NO_GPU):
        print(_ADVICE, file=sys.stderr)


class DeviceAsCpu(TorchFunctionMode):
    """Reads a CUDA device as the CPU in every call of PyTorch that is given one, and `.cuda()` as nothing.

    What a program asks of `torch.cuda` itself (streams, events, properties) stays as it is, and a tensor says that it
    is on the CPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        placed = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_cpu, args), **placed)


def _cpu(value: Any) -> Any:
    """The CPU for a CUDA device, or its name; anything else as it is."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")) else value
