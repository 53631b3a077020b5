"""The stages of a run, in order of worth."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One kind of work, in separate processes.

    A stage of rows first reports the names of its rows. It reports the start of each row, and then its result. If a
    process dies or hangs in a row, only that row is lost: another process continues with the next row.
    """

    name: str
    about: str
    command: tuple[str, ...]  # {scratch} is a folder, {minutes} the process's remaining time
    seconds: float  # limit for all its processes together
    needs: float = 5.0  # it does not start with less time left
    row_seconds: float = math.inf  # limit for one row, including the start of its process
    file: str = "log.txt"  # file of its output
    brings: str = ""  # a file in {scratch} that its processes write, also copied to the output folder


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def rows(name: str, about: str, seconds: float, needs: float = 8.0, row_seconds: float = 60.0) -> Stage:
    return Stage(name, about, _python("first_contact.worker", name), seconds, needs, row_seconds)


def benchmarks(
    name: str, about: str, seconds: float, which: str, emulated: bool, file: str = "benchmarks.json"
) -> Stage:
    """Rows of `pytest benchmarks/`. A group with rows in the file is not measured again."""
    rehearsed = ("-p", "rehearsal", "--sizes", "small") if emulated else ()
    pytest = _python(
        "pytest", str(ROOT / "benchmarks"), "--benchmark-only", "--device", "cuda", "-k", which,
        "--minutes", "{minutes}", "--rows", "{scratch}/" + file, "--resume", *rehearsed,
        "-p", "first_contact.plugin", "-p", "no:cacheprovider", "-q",
    )  # fmt: skip
    return Stage(name, about, pytest, seconds, needs=15, row_seconds=150, brings=file)


ROOT = Path(__file__).resolve().parents[2]
_COMPILED = "compiled.json"
#: The one group whose torch.compile is worth a minute of compiling before the other groups.
COMPILED_STEP = "compile and model and training and step and amp and B6"


def _compile(name: str, dtype: str, emulated: bool) -> Stage:
    """Compile for the present GPU; in a rehearsal for Hopper. One process for each dtype, because its first step runs
    alone.
    """
    target = ("--target", "sm_90") if emulated else ()
    command = _python("cast_kernels", "compile", *target, "--dtype", dtype, "--cache")
    return Stage(name, f"kernels of autocast to {dtype} into Triton's cache", command, 75)


#: The stages' seconds add up to these minutes.
MINUTES = 8.0


def stages(emulated: bool, minutes: float = MINUTES) -> list[tuple[Stage, ...]]:
    """The stages in order of worth. Stages in one tuple run at the same time, because none of them uses the GPU.

    Args:
        emulated: whether a rehearsal's device replaces the GPU.
        minutes: of the whole run. Stages get a proportional share of it; rows never get less than their default.
    """
    scale = minutes / MINUTES
    return [tuple(_scaled(stage, scale) for stage in wave) for wave in _waves(emulated)]


def _scaled(stage: Stage, scale: float) -> Stage:
    return replace(stage, seconds=scale * stage.seconds, row_seconds=max(1.0, scale) * stage.row_seconds)


def _waves(emulated: bool) -> tuple[tuple[Stage, ...], ...]:
    return (
        (
            Stage("machine", "what the machine is", _python("first_contact.machine"), 60, file="machine.txt"),
            Stage("build", "pip install -e . with the native core", _python("first_contact.build"), 75),
            _compile("compile", "bf16", emulated),
            _compile("compile_fp16", "fp16", emulated),
        ),
        (rows("correctness", "errors against fp64, at most twice eager's", 80),),
        (benchmarks("times", "ours and eager, medians of CUDA events", 140, "not compile and not host", emulated),),
        (rows("step", "one training step: kernels by time, time on the host, kernels as loaded", 40),),
        (benchmarks("compiled_step", "a training step beside torch.compile", 80, COMPILED_STEP, emulated, _COMPILED),),
        (rows("repetition", "the same bits, many times over", 35),),
        (benchmarks("compiled", "everything else beside torch.compile", 300, "compile", emulated, _COMPILED),),
        (rows("sanitizer", "compute-sanitizer", 400, needs=30, row_seconds=200),),
    )
