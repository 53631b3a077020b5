"""Casts of frozen weights under autocast: once a step if backward can reuse forward's copies, none for weights that are
given in autocast's dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from cast_kernels.problem import FFNProblem, Recompute, SelfAttentionProblem
from cast_kernels.triton.common import Parameters


def frozen(problem: FFNProblem | SelfAttentionProblem, parameters: Parameters, names: Iterable[str]) -> tuple[int, ...]:
    """Indices of the parameters that :func:`cast_frozen` casts.

    Autograd keeps the op's arguments, so backward reuses the copies and then frees them; one launch makes them all.
    With `all` the op casts in forward and again in backward: the copies would not grow with the batch, but they are
    more than "a few numbers a row". Compilers and `torch.func` get the parameters unchanged, because their tensors do
    not say whether they are frozen.

    Args:
        problem: the call's.
        parameters: of the op.
        names: of those that products read in the compute dtype.
    """
    if problem.autocast is None or problem.recompute is Recompute.ALL:
        return ()
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return ()
    fields = ((i, getattr(parameters, name)) for i, name in enumerate(parameters._fields) if name in names)
    return tuple(i for i, t in fields if t is not None and not t.requires_grad and t.dtype != problem.compute)


def cast_frozen(parameters: Parameters, places: tuple[int, ...], compute: torch.dtype) -> Parameters:
    """The parameters, with the :func:`frozen` ones cast to the compute dtype, which is autocast's."""
    if not places:
        return parameters
    fields: list[Any] = list(parameters)
    given = [fields[i] for i in places]
    copies = [torch.empty_like(t, dtype=compute, memory_format=torch.contiguous_format) for t in given]
    torch._foreach_copy_(copies, given)
    for i, copy in zip(places, copies, strict=True):
        fields[i] = copy
    return type(parameters)(*fields)
