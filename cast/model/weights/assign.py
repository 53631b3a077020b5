"""Compare a translated checkpoint with a model, and copy its tensors into the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def check(what: str, target: Mapping[str, Tensor], given: Mapping[str, Tensor], unknown: Iterable[str] = ()) -> None:
    """Check that `given` has every tensor of `target` in its shape, and nothing else.

    Raises:
        ValueError: lists every missing key, every unexpected one, and every shape that differs.
    """
    missing = [key for key in target if key not in given]
    unexpected = [*unknown, *(key for key in given if key not in target)]
    shapes = [
        f"{key} is {list(given[key].shape)}, the model has {list(target[key].shape)}"
        for key in target
        if key in given and given[key].shape != target[key].shape
    ]
    problems = [
        f"{title}: {', '.join(keys)}"
        for title, keys in (("missing keys", missing), ("unknown keys", unexpected), ("other shapes", shapes))
        if keys
    ]
    if problems:
        raise ValueError(f"{what} does not fit this model; {'; '.join(problems)}")


def assign(what: str, target: Mapping[str, Tensor], given: Mapping[str, Tensor], unknown: Iterable[str] = ()) -> None:
    """:func:`check`, then copy every tensor, in the target's dtype and on its device."""
    check(what, target, given, unknown)
    with torch.no_grad():
        for key, tensor in target.items():
            tensor.copy_(given[key])
