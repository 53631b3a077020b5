"""CUDA's autocast rules for tensors on the CPU, real or fake.

PyTorch's CPU autocast keeps LayerNorm in its input's dtype; CUDA's runs it in float32. For the operators that the ops
here call there is no other difference: `tests/test_whole_model.py` compares a model's operators with those under CUDA's
own rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def cuda_rules(dtype: torch.dtype | None, device: str = "cpu") -> Iterator[None]:
    """Autocast to `dtype`, or no autocast for None, for tensors on the CPU or on `device`."""
    if dtype is None:
        yield
        return
    if device != "cpu":
        with torch.autocast(device, dtype):
            yield
        return
    plain = F.layer_norm

    def layer_norm(
        x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = x.float(), *(t if t is None else t.float() for t in (weight, bias))
        return plain(x, shape, weight, bias, eps)

    with mock.patch("torch.nn.functional.layer_norm", layer_norm), torch.autocast("cpu", dtype):
        yield
