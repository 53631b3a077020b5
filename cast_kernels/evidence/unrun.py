"""Record operators without running them, on real tensors without contents: a step's calls of PyTorch and of Triton.

Triton's launches need tensors with addresses, which fake tensors lack. Here every operator returns uninitialised memory
of the right shape. Nothing touches it, so the largest batch needs no memory and no time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from cast_kernels.evidence.eager_model import Ledger, launches_nothing


class Unrun(Ledger):
    """A ledger whose operators compute nothing. Our own operators run their host code, which launches kernels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fake = FakeTensorMode()

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace == "cast_kernels":
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        if launches_nothing(func):
            return func(*args, **kwargs)
        given = tree_map_only(Tensor, self._fake.from_tensor, (args, kwargs))
        with self._fake:
            found = func(*given[0], **given[1])
        if func._schema.is_mutable:
            given = kwargs["out"] if "out" in kwargs else args[0]
            return given if func._schema.returns else None
        return tree_map_only(Tensor, _uninitialised, found)


def _uninitialised(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
