"""The measuring code's interface to the GPU: events, memory, graphs, the sanitizer. Tests have their own machine."""

from __future__ import annotations

import gc
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from cast_kernels import assemblers

#: A call without arguments; nobody reads its result.
Step = Callable[[], object]


#: compute-sanitizer slows kernels down a hundredfold and more; a run longer than this hangs.
_SANITIZER_SECONDS = 1800


class NoGPUError(RuntimeError):
    """There is no GPU that PyTorch can use; the message says why."""


class UnusableError(RuntimeError):
    """The GPU answers no call any more: a kernel faulted, and CUDA repeats its error until the process ends."""


def require_usable(machine: Machine) -> None:
    """Raise UnusableError if an earlier fault has ended the GPU's context."""
    try:
        machine.synchronise()
    except Exception as error:
        raise UnusableError(
            f"the GPU can be used no more ({type(error).__name__}: {error}); what follows was not run"
        ) from error


class Machine(Protocol):
    """The functions of a GPU."""

    device: torch.device
    #: The name of the stand-in for the GPU, "" if figures are measurements. Reports mark every row with it.
    stand_in: str

    def describe(self) -> dict[str, Any]:
        """Name and figures for the report; "name" and "multiprocessors" are always there."""

    def elapsed_ms(self, step: Step, repeats: int = 1) -> float:
        """Milliseconds of one call, by two events around so many calls; waits for the second."""

    def synchronise(self) -> None:
        """Wait for everything that was launched."""

    def computed(self) -> bool:
        """Whether all launches since the last call of this function were executed, not only recorded."""

    def flush_cache(self) -> None:
        """Push everything out of L2."""

    def free(self) -> None:
        """Free the memory of all unreachable objects."""

    def peak_bytes(self, step: Step) -> int:
        """Most memory allocated during one call, above that before the call."""

    def graph_pool(self) -> Any:
        """Memory that several graphs share: together they need only as much as the largest."""

    def capture(self, step: Step, pool: Any = None) -> Step:
        """A call that replays a graph of the step. RuntimeError if it cannot be captured; then the pool must not be
        used again."""

    def sanitize(self, tool: str, code: str, seconds: float = math.inf) -> tuple[bool, str] | None:
        """Run Python code under compute-sanitizer -> whether it found nothing, and its last lines; None: not installed.

        It is ended after `seconds`, or after half an hour.
        """


class CudaMachine:
    """The current CUDA device.

    Raises:
        NoGPUError: there is none.
    """

    stand_in = ""
    #: Twice the largest L2 of the GPUs that kernels are compiled for is 200 MB.
    flush_bytes = 256 << 20

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            raise NoGPUError(f"no CUDA device can be used: PyTorch {torch.__version__} is {built}, and sees none")
        self.device: torch.device = self.current_device()
        self._flush = torch.empty(self.flush_bytes, dtype=torch.int8, device=self.device)

    def current_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def describe(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(self.device)
        return {
            "name": found.name, "capability": f"sm_{found.major}{found.minor}",
            "multiprocessors": found.multi_processor_count, "memory_bytes": found.total_memory,
            "driver": driver_version(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "torch": torch.__version__,
            "ptxas": assemblers.line(assemblers.describe(10 * found.major + found.minor)),
        }  # fmt: skip

    def elapsed_ms(self, step: Step, repeats: int = 1) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / repeats

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.device)

    def computed(self) -> bool:
        return True

    def flush_cache(self) -> None:
        self._flush.zero_()

    def free(self) -> None:
        gc.collect()  # models and their steps refer to each other
        torch.cuda.empty_cache()

    def peak_bytes(self, step: Step) -> int:
        self.synchronise()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        self.synchronise()
        return torch.cuda.max_memory_allocated(self.device) - before

    def graph_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, step: Step, pool: Any = None) -> Step:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # the graph must not contain the first use's allocation and compilation
            for _ in range(3):
                step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        return graph.replay

    def sanitize(self, tool: str, code: str, seconds: float = math.inf) -> tuple[bool, str] | None:
        path = shutil.which("compute-sanitizer")
        if path is None:
            return None
        command = [path, "--tool", tool, "--error-exitcode", "86", sys.executable, "-c", code]
        # PyTorch's allocator cuts tensors out of large blocks; inside a block CUDA sees no access out of bounds.
        seconds = min(seconds, _SANITIZER_SECONDS)
        return _within(seconds, command, os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def driver_version() -> str:
    """The version of NVIDIA's driver, from the kernel module."""
    path = Path("/proc/driver/nvidia/version")
    try:
        found = re.search(r"Module.*?\s(\d+(?:\.\d+)+)\s", path.read_text())
    except OSError:
        return f"unknown: {path} cannot be read"
    return found[1] if found else f"unknown: {path} names none"


def _within(seconds: float, command: Sequence[str], environment: Mapping[str, str]) -> tuple[bool, str]:
    """Run a command -> whether it succeeded in time, and its last lines. Nothing that it started outlives it."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.returncode is None:  # with its children: compute-sanitizer's would still hold the GPU
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = output.read().splitlines()[-5:]
    return code == 0, "\n".join([*lines, f"not done after {seconds:g} s"] if code is None else lines)
