"""Casts of frozen weights under autocast: once a step where backward may keep what forward made."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cast_kernels.problem import FFNProblem, Recompute, SelfAttentionProblem
from cast_kernels.triton.common import Parameters, cast_fields


def cast_frozen(problem: FFNProblem | SelfAttentionProblem, parameters: Parameters, names: Iterable[str]) -> Parameters:
    """The parameters, the frozen ones among `names` in autocast's dtype if backward is to find everything kept.

    Autograd keeps what the op was given, so backward finds the copies and they go with it; all are made in one launch.
    At other levels the op's forward casts and its backward casts again. Compilers and `torch.func`, in which a tensor
    does not say whether it is frozen, get the parameters as they are.
    """
    if problem.autocast is None or problem.recompute is not Recompute.NOTHING:
        return parameters
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return parameters
    given = ((name, getattr(parameters, name)) for name in names)
    frozen = [name for name, t in given if t is not None and not t.requires_grad]
    return cast_fields(parameters, frozen, problem.compute)
