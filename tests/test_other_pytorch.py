"""A PyTorch whose inner functions are other than those that know a call again: the ops work by the public way."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from bcast_cases import AWKWARD
from derivative_cases import CALLS, KERNELS
from torch import Tensor

import cast_kernels
from cast_kernels import _native, info
from cast_kernels.ops import _signatures
from cast_kernels.ops._operator import Operator

pytestmark = pytest.mark.skipif(_native.CORE is None, reason=f"nothing to test: {_native.REASON}")
OPS = [op for _, op in KERNELS]


class _OtherForm:
    """`TensorGuards` with other arguments."""

    def __init__(self, *tensors: Tensor) -> None: ...


class _Lenient:
    """`TensorGuards` that finds everything alike."""

    def __init__(self, *tensors: Tensor, **_: Any) -> None: ...

    def check(self, *tensors: Tensor) -> bool:
        return True


def operator(op: str) -> Operator:
    return importlib.import_module(f"cast_kernels.ops.{op}").OPERATOR


def step(op: str) -> list[Tensor]:
    """Outputs and gradients."""
    xs = [x.requires_grad_() for x in CALLS[op].tensors(torch.float32)]
    outputs = CALLS[op].function("cpu")(*xs)
    return [*outputs, *torch.autograd.grad([y.square().sum() for y in outputs], xs)]


def said() -> tuple[str, str]:
    case = AWKWARD
    return cast_kernels.explain(case.module(), *case.inputs()), info.collect()["runs"]["repeated_calls"]


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that the ops call, in order. Nothing is known of earlier calls."""
    seen: list[str] = []
    for op in OPS:
        own = operator(op)
        monkeypatch.setattr(own, "_known", _signatures.Signatures())
        for field, name in (("_overload", op), ("_backward_overload", f"{op}_backward")):
            overload = getattr(own, field)
            monkeypatch.setattr(own, field, lambda *xs, n=name, call=overload: (seen.append(n), call(*xs))[1])
    return seen


def test_this_pytorch_knows_a_call_again(dispatched: list[str]) -> None:
    for op in OPS:
        step(op)
        assert len(operator(op)._known) == 1
    assert dispatched == []
    explained, shown = said()
    assert "is checked" not in explained
    assert shown == "a call like an earlier one is not checked again"


@pytest.mark.parametrize(("form", "says"), [(None, "ImportError"), (_OtherForm, "TypeError"), (_Lenient, "answers")])
def test_another_one_checks_and_dispatches_every_call_and_says_so(
    form: type | None, says: str, monkeypatch: pytest.MonkeyPatch, dispatched: list[str]
) -> None:
    expected = {op: step(op) for op in OPS}
    if form is None:
        monkeypatch.delattr("torch._C._dynamo.guards.TensorGuards")
    else:
        monkeypatch.setattr("torch._C._dynamo.guards.TensorGuards", form)
    monkeypatch.setattr(_signatures, "FAULT", _signatures.find_fault())
    assert says in _signatures.FAULT
    for op in OPS:
        monkeypatch.setattr(operator(op), "_known", _signatures.Signatures())
        for _ in range(2):
            assert all(map(torch.equal, step(op), expected[op]))
            assert dispatched == [op, f"{op}_backward"]
            dispatched.clear()
        assert len(operator(op)._known) == 0
    for text in said():
        assert "every call is checked and goes through PyTorch's dispatcher" in text
        assert _signatures.FAULT in text
