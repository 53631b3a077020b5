"""Casts of frozen weights under autocast: once a step where backward may find what forward made, none if they are given
in autocast's dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cast_kernels.problem import FFNProblem, Recompute, SelfAttentionProblem
from cast_kernels.triton.common import Parameters, cast_fields


def cast_frozen(problem: FFNProblem | SelfAttentionProblem, parameters: Parameters, names: Iterable[str]) -> Parameters:
    """The parameters, the frozen ones among `names` in autocast's dtype unless backward is to find nothing kept.

    Autograd keeps what the op was given, so backward finds the copies and they go with it; all are made in one launch.
    With `all` the op's forward casts and its backward casts again: what is kept would not grow with the batch, but it
    is more than "a few numbers a row". Compilers and `torch.func`, in which a tensor does not say whether it is
    frozen, get the parameters as they are.
    """
    if problem.autocast is None or problem.recompute is Recompute.ALL:
        return parameters
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return parameters
    given = {name: getattr(parameters, name) for name in names}
    return cast_fields(
        parameters, [name for name, t in given.items() if t is not None and not t.requires_grad], problem.compute
    )
