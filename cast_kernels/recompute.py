"""The rule of `recompute="auto"`: how much a call's forward keeps for backward.

On a GPU, keeping values is faster than computing them again, until memory is short. The rule reads only the call's
shapes and the device's whole memory, never the memory that is free. So a model keeps the same values in every step, on
every machine with this GPU, and a compiler may treat the answer as a constant. On other devices the level is "cheap".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from cast_kernels.compiling import constant
from cast_kernels.problem import AdapterProblem, FFNProblem, Problem, Recompute, SelfAttentionProblem

#: Problems that know their level.
Posed = TypeVar("Posed", FFNProblem, SelfAttentionProblem, AdapterProblem)

AUTO = "auto"
#: A call keeps everything if that takes at most 1/PART of the device's memory. A model of twelve blocks makes 36 calls
#: that keep much (two FFNs and an exchange a block): at most a fifth of the memory. A model of 24 blocks takes two
#: fifths. CAST-B keeps everything up to 32 clips on a GPU of 80 GB.
PART = 180
#: Listed here, at import: torch.compile of torch 2.11 cannot iterate over an enumeration.
LEVELS = (AUTO, *(level.value for level in Recompute))

_WORD = 4  # bytes of a kept element


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
    if device.type != "cuda" or not torch.is_grad_enabled():  # without a backward nothing is kept anyway
        return Recompute.CHEAP
    return Recompute.NOTHING if kept(problem) <= allowed(device) else Recompute.CHEAP


def settle(problem: Posed, recompute: Recompute | str, device: torch.device) -> Posed:
    """The problem at the level that :func:`resolve` returns."""
    level = resolve(recompute, problem, device)
    return problem if problem.recompute is level else replace(problem, recompute=level)


def kept(problem: Any) -> int:
    """Bytes that one call's forward keeps with "nothing" on a GPU, without those of PyTorch's own operators."""
    return _KEPT[type(problem)](problem)


def allowed(device: torch.device) -> int:
    """Bytes that one call may keep on the device."""
    return _total_memory(device.index) // PART


def explain(problem: Any, device: torch.device) -> str:
    """The level of "auto" for the problem, with the rule's numbers, as text."""
    if device.type != "cuda":
        return f"recompute='auto' is 'cheap' on {device.type}"
    mine, limit = kept(problem), allowed(device)
    level = Recompute.NOTHING if mine <= limit else Recompute.CHEAP
    return (
        f"recompute='auto' is '{level}': 'nothing' keeps {mine / 2**20:.1f} MiB of a call and is taken up to "
        f"{limit / 2**20:.1f} MiB, 1/{PART} of the {_total_memory(device.index) / 2**30:.1f} GiB of {device}"
    )


@constant
def _total_memory(index: int | None) -> int:
    """Bytes of a GPU, 0 where there is none."""
    return torch.cuda.get_device_properties(index).total_memory if torch.cuda.is_available() else 0


def _of_adapter(problem: AdapterProblem | SelfAttentionProblem) -> int:
    rows = problem.rows if isinstance(problem, AdapterProblem) else problem.batch * problem.tokens
    return rows * problem.adapter * problem.compute.itemsize


def _of_ffn(problem: FFNProblem) -> int:
    from cast_kernels.triton import ffn as triton_ffn

    return problem.rows * triton_ffn.saved_words(replace(problem, recompute=Recompute.NOTHING)) * _WORD


def _of_exchange(problem: Problem) -> int:
    from cast_kernels.triton import bcast as triton_bcast

    return problem.batch * triton_bcast.saved_words(problem, Recompute.NOTHING.value) * _WORD


_KEPT: dict[type, Callable[[Any], int]] = {
    Problem: _of_exchange,
    FFNProblem: _of_ffn,
    SelfAttentionProblem: _of_adapter,
    AdapterProblem: _of_adapter,
}
