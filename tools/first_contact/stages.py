"""What is done, in order of worth."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One kind of work, in processes of its own.

    A stage of rows says at its start which there are, and before and after each that it begins and what was found. A
    row in which its process dies or hangs costs that row: another process goes on with the next.
    """

    name: str
    about: str
    command: tuple[str, ...]
    seconds: float  # most of all its processes
    needs: float = 5.0  # with less time left it is not begun
    row_seconds: float = math.inf  # most of one row, the start of its process included
    file: str = "log.txt"  # where its output goes


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def _rows(name: str, about: str, seconds: float, needs: float = 8.0, row_seconds: float = 60.0) -> Stage:
    return Stage(name, about, _python("first_contact.worker", name), seconds, needs, row_seconds)


#: Stages in one tuple run at the same time: none of them uses the GPU.
STAGES: tuple[tuple[Stage, ...], ...] = (
    (
        Stage("machine", "what the machine is", _python("first_contact.machine"), 60, file="machine.txt"),
        Stage("build", "pip install -e . with the native core", _python("first_contact.build"), 120),
    ),
    (_rows("correctness", "errors against fp64, at most twice eager's", 120),),
    (_rows("ceilings", "copy bandwidth and GEMM rate", 30),),
    (_rows("times", "medians of CUDA events", 200, row_seconds=90),),
    (_rows("repetition", "the same bits, many times over", 40),),
    (_rows("step", "one training step: kernels by time, time on the host", 60),),
    (_rows("kernels", "registers and spills as loaded", 30),),
    (_rows("sanitizer", "compute-sanitizer", 240, needs=30, row_seconds=200),),
)
