"""How often a training step under autocast casts the frozen experts' matrices, at each recompute level, counted.

Launches on backend `triton` are recorded, not run; PyTorch's operators run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cast_models import small_video
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Recorder, offline_driver
from test_not_finite import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cast
from cast_kernels import _native

BF16 = torch.bfloat16
_COPY_ALL = torch._foreach_copy_


class Casts(TorchDispatchMode):
    """How often each of the tensors is read by a cast: PyTorch's operators, and ours, whose inside no mode sees."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.of = {x.untyped_storage().data_ptr(): i for i, x in enumerate(tensors)}
        self.counted: Counter[int] = Counter(dict.fromkeys(range(len(tensors)), 0))

    def note(self, x: object) -> None:
        if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self.of:
            self.counted[self.of[x.untyped_storage().data_ptr()]] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            self.note(args[name == "copy_"])
        return func(*args, **(kwargs or {}))

    def copy_all(self, to: list[Tensor], given: list[Tensor]) -> None:
        """In the place of `torch._foreach_copy_`."""
        for x in given:
            self.note(x)
        _COPY_ALL(to, given)


def frozen(model: cast.CAST) -> list[Tensor]:
    """The matrices of the experts' blocks."""
    return [p for p in model.blocks.parameters() if not p.requires_grad and p.ndim == 2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled kernels lie for the next test."""
    return tmp_path_factory.mktemp("kernels")


def counted(model: cast.CAST, folder: Path) -> set[int]:
    """How often a matrix is cast in one step, every number that occurs."""
    casts = Casts(frozen(model))
    with offline_driver(target("sm_80"), Recorder(), folder), casts, mock.patch("torch._foreach_copy_", casts.copy_all):
        with torch.autocast("cpu", BF16):
            logits = torch.cat(list(model(small_video(model, dtype=torch.float32)).values()), 1)
        logits.float().square().sum().backward()
    return set(casts.counted.values())


@pytest.mark.parametrize(("level", "times"), [("nothing", {1}), ("cheap", {1}), ("all", {1, 2})])
def test_a_step_casts_a_frozen_matrix_once_where_anything_is_kept(
    level: str, times: set[int], compiled: Path
) -> None:  # fmt: skip
    """With `all` the output projection's once, by PyTorch's operator, and all others in both directions."""
    model = tiny_model("triton", level)
    assert len(frozen(model)) == 16
    assert counted(model, compiled) == times


@pytest.mark.parametrize("level", ["nothing", "cheap", "all"])
def test_a_frozen_matrix_in_autocasts_dtype_is_never_cast(level: str, compiled: Path) -> None:
    model = tiny_model("triton", level)
    for p in frozen(model):
        p.data = p.data.to(BF16)
    assert counted(model, compiled) == {0}


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_frozen_matrix_in_autocasts_dtype_changes_no_bit(backend: str) -> None:
    """Autocast rounds it at every call to what it is then.

    Backend `cpu` rounds what it packs for products where these take bfloat16 operands; elsewhere it does not round the
    float32 matrix, which is more exact.
    """
    results = []
    for given in (False, True):
        model = tiny_model(backend)
        for p in frozen(model) if given else []:
            p.data = p.data.to(BF16)
        with torch.autocast("cpu", BF16):
            logits = torch.cat(list(model(small_video(model, dtype=torch.float32)).values()), 1)
        logits.float().square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    equal = all(map(torch.equal, *results))
    assert equal == (backend == "eager" or _native.ISA == "avx512_bf16")
