"""The rule of `recompute="auto"`: how much a call's forward keeps for backward.

Keeping values is faster than computing them again, until memory is short. The rule reads only the call's shapes and the
device's whole memory, never the memory that is free. So a model keeps the same values in every step, on every machine
with this GPU or this much memory, and a compiler may treat the answer as a constant. A CPU's memory is the machine's or
the container's, divided by the processes that a launcher has started on it. On devices without kernels the level is
"cheap".
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from cast_kernels.compiling import constant
from cast_kernels.problem import AdapterProblem, FFNProblem, Problem, Recompute, SelfAttentionProblem

#: Problems that know their level.
Posed = TypeVar("Posed", FFNProblem, SelfAttentionProblem, AdapterProblem)

AUTO = "auto"
#: Device -> a call keeps everything if that takes at most 1/PART of the device's memory. On a GPU a model of twelve
#: blocks makes 36 calls that keep much (two FFNs and an exchange a block): at most a fifth of the memory. A model of 24
#: blocks takes two fifths. CAST-B keeps everything up to 32 clips on a GPU of 80 GB. On a CPU 60 calls of CAST-B keep
#: something. Of one clip in float32 an exchange keeps 28 MiB, and a training step 56 times as much with the streams: at
#: most half of the memory. CAST-B keeps everything up to 7 clips in 24 GiB.
PART = {"cuda": 180, "cpu": 112}
#: Listed here, at import: torch.compile of torch 2.11 cannot iterate over an enumeration.
LEVELS = (AUTO, *(level.value for level in Recompute))

_WORD = 4  # bytes of a kept element
#: Limits of a container's memory, by version 2 and version 1 of Linux' control groups.
_CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check(recompute: Recompute | str) -> str:
    """The name, or ValueError naming the allowed ones."""
    if recompute not in LEVELS:
        raise ValueError(f"recompute is {recompute!r}; allowed: {', '.join(map(repr, LEVELS))}")
    return str(recompute)


def resolve(recompute: Recompute | str, problem: Any, device: torch.device) -> Recompute:
    """The level of a call: the named one, or the rule's.

    Args:
        recompute: a level, or "auto".
        problem: any op's, on this device.
        device: of the streams.

    Raises:
        ValueError: no such level.
    """
    if check(recompute) != AUTO:
        return Recompute(recompute)
    if device.type not in PART or not torch.is_grad_enabled():  # without a backward nothing is kept anyway
        return Recompute.CHEAP
    if torch.compiler.is_exporting():  # the program is for every batch, and a comparison would limit it
        return Recompute.CHEAP
    return Recompute.NOTHING if kept(problem, device) <= allowed(device) else Recompute.CHEAP


def settle(problem: Posed, recompute: Recompute | str, device: torch.device) -> Posed:
    """The problem at the level that :func:`resolve` returns."""
    level = resolve(recompute, problem, device)
    return problem if problem.recompute is level else replace(problem, recompute=level)


def kept(problem: Any, device: torch.device) -> int:
    """Bytes that one call's forward keeps with "nothing" on the device, without those of PyTorch's own operators."""
    return _KEPT[device.type][type(problem)](problem)


def allowed(device: torch.device) -> int:
    """Bytes that one call may keep on the device."""
    return _memory(device) // PART[device.type]


def explain(problem: Any, device: torch.device) -> str:
    """The level of "auto" for the problem, with the rule's numbers, as text."""
    if device.type not in PART:
        return f"recompute='auto' is 'cheap' on {device.type}"
    mine, limit, part = kept(problem, device), allowed(device), PART[device.type]
    level = Recompute.NOTHING if mine <= limit else Recompute.CHEAP
    whose = str(device) if device.type == "cuda" else "memory that a process has here"
    return (
        f"recompute='auto' is '{level}': 'nothing' keeps {mine / 2**20:.1f} MiB of a call and is taken up to "
        f"{limit / 2**20:.1f} MiB, 1/{part} of the {_memory(device) / 2**30:.1f} GiB of {whose}"
    )


def _memory(device: torch.device) -> int:
    return _total_memory(device.index) if device.type == "cuda" else _host_memory()


@constant
def _total_memory(index: int | None) -> int:
    """Bytes of a GPU, 0 where there is none."""
    return torch.cuda.get_device_properties(index).total_memory if torch.cuda.is_available() else 0


@constant
def _host_memory() -> int:
    """Bytes of memory for this process: the machine's or its container's, a part where a launcher started several."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _CONTAINER:
        text = limit.read_text().strip() if limit.is_file() else ""
        whole = min(whole, int(text)) if text.isdecimal() else whole  # "max": no limit
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")  # of torchrun and accelerate
    return whole // max(1, int(processes) if processes.isdecimal() else 1)


def _of_adapter(problem: AdapterProblem | SelfAttentionProblem) -> int:
    rows = problem.rows if isinstance(problem, AdapterProblem) else problem.batch * problem.tokens
    return rows * problem.adapter * problem.compute.itemsize


def _of_ffn(problem: FFNProblem) -> int:
    from cast_kernels.triton import ffn as triton_ffn

    return problem.rows * triton_ffn.saved_words(replace(problem, recompute=Recompute.NOTHING)) * _WORD


def _of_exchange(problem: Problem) -> int:
    from cast_kernels.triton import bcast as triton_bcast

    return problem.batch * triton_bcast.saved_words(problem, Recompute.NOTHING.value) * _WORD


def _of_cpu_ffn(problem: FFNProblem) -> int:
    from cast_kernels.cpu import ffn as cpu_ffn

    return problem.rows * cpu_ffn.saved_words(replace(problem, recompute=Recompute.NOTHING)) * _WORD


def _of_cpu_self_attention(problem: SelfAttentionProblem) -> int:
    from cast_kernels.cpu import self_attention as cpu_self_attention

    return cpu_self_attention.saved_words(replace(problem, recompute=Recompute.NOTHING)) * _WORD


def _of_cpu_exchange(problem: Problem) -> int:
    from cast_kernels.cpu import bcast as cpu_bcast

    return problem.batch * cpu_bcast.saved_words(problem, Recompute.NOTHING.value) * _WORD


_KEPT: dict[str, dict[type, Callable[[Any], int]]] = {
    "cuda": {
        Problem: _of_exchange,
        FFNProblem: _of_ffn,
        SelfAttentionProblem: _of_adapter,
        AdapterProblem: _of_adapter,
    },
    "cpu": {
        Problem: _of_cpu_exchange,
        FFNProblem: _of_cpu_ffn,
        SelfAttentionProblem: _of_cpu_self_attention,
        AdapterProblem: lambda problem: 0,  # the native core has no kernel of the adapter alone
    },
}
