"""Calls that were checked before: what follows is checked again as soon as anything that a check looks at differs.

And the short way past PyTorch's dispatcher: taken where nothing could see it, with the bits of the long one.
"""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from derivative_cases import CALLS, KERNELS
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import cast_kernels
from cast_kernels import BackendError, FFNParameters, _native
from cast_kernels.ops import _operator, _signatures
from cast_kernels.ops._operator import Operator
from cast_kernels.ops._signatures import MOST_ARGUMENTS, MOST_LISTS, Signatures

pytestmark = pytest.mark.skipif(_native.CORE is None, reason=f"nothing to test: {_native.REASON}")
kernels = pytest.mark.parametrize("op", [op for _, op in KERNELS])


def operator(op: str) -> Operator:
    return importlib.import_module(f"cast_kernels.ops.{op}").OPERATOR


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in CALLS:
        monkeypatch.setattr(operator(op), "_known", Signatures())


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that the ops call, in order."""
    seen: list[str] = []

    def watched(name: str, overload: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs: seen.append(name) or overload(*inputs)  # type: ignore[func-returns-value]

    for op in CALLS:
        for field in ("_overload", "_backward_overload"):
            own = getattr(operator(op), field)
            monkeypatch.setattr(operator(op), field, watched(own.name().removeprefix("cast_kernels::"), own))
    return seen


def leaves(op: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.requires_grad_() for x in CALLS[op].tensors(dtype)]


def everything(op: str, xs: list[Tensor]) -> list[Tensor]:
    outputs = CALLS[op].function("cpu")(*xs)
    wanted = [x for x in xs if x.requires_grad]
    if not torch.is_grad_enabled() or not wanted:
        return list(outputs)
    return [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), wanted)]


def afresh(op: str, xs: list[Tensor]) -> list[Tensor]:
    """What a process answers that has checked no call before."""
    own, known = operator(op), operator(op)._known
    own._known = Signatures()
    try:
        return everything(op, xs)
    finally:
        own._known = known


def assert_same(found: list[Tensor], want: list[Tensor]) -> None:
    assert [x.dtype for x in found] == [x.dtype for x in want]
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


# --- checked again ---------------------------------------------------------------------------------------------------

Change = Callable[[list[Tensor]], None]


def _resized(xs: list[Tensor]) -> None:
    xs[-1].data = xs[-1].data[:-1].clone()


def _one_dtype(xs: list[Tensor]) -> None:
    xs[-1].data = xs[-1].data.double()


def _replaced(xs: list[Tensor]) -> None:
    xs[-1] = torch.ones(3)


def _whole_numbers(xs: list[Tensor]) -> None:
    xs[-1] = xs[-1].detach().int()


def _no_tensor(xs: list[Tensor]) -> None:
    xs[-1] = 1.0  # type: ignore[call-overload]


def _elsewhere(xs: list[Tensor]) -> None:
    xs[-1] = xs[-1].detach().to("meta")


def _a_stream_of_another_width(xs: list[Tensor]) -> None:
    xs[0] = torch.randn(*xs[0].shape[:-1], 8)


WRONG: list[Change] = [
    _resized, _one_dtype, _replaced, _whole_numbers, _no_tensor, _elsewhere, _a_stream_of_another_width,
]  # fmt: skip


@kernels
@pytest.mark.parametrize("change", WRONG)
def test_what_became_wrong_is_refused_in_the_same_words(op: str, change: Change) -> None:
    xs = leaves(op)
    for _ in range(2):
        everything(op, xs)
    change(xs)
    with pytest.raises((ValueError, TypeError)) as first:
        afresh(op, xs)
    for _ in range(2):
        with pytest.raises(first.type) as error:
            everything(op, xs)
        assert str(error.value) == str(first.value)


def _other_values(xs: list[Tensor]) -> None:
    with torch.no_grad():
        for x in xs:
            x.mul_(0.5)


def _other_strides(xs: list[Tensor]) -> None:
    for i, x in enumerate(xs):
        wide = torch.zeros(*x.shape, 2)
        wide[..., 0] = x.detach()
        xs[i] = wide[..., 0].requires_grad_()


def _bfloat16(xs: list[Tensor]) -> None:
    for x in xs:
        x.data = x.data.bfloat16()


def _double_clip(xs: list[Tensor]) -> None:
    for i, x in enumerate(xs):
        if x.ndim > 2:
            xs[i] = torch.cat((x.detach(), 2 * x.detach())).requires_grad_()


def _frozen(xs: list[Tensor]) -> None:
    for x in xs[1::2]:
        x.requires_grad_(False)


def _constant(xs: list[Tensor]) -> None:
    for x in xs:
        x.requires_grad_(False)


def _negated_lazily(xs: list[Tensor]) -> None:
    for i, x in enumerate(xs):
        xs[i] = torch._neg_view(-x.detach())
        assert xs[i].is_neg()


def _empty(xs: list[Tensor]) -> None:
    for i, x in enumerate(xs):
        if x.ndim > 2:
            xs[i] = x.detach()[:0].requires_grad_()


RIGHT: list[Change] = [
    _other_values, _other_strides, _bfloat16, _double_clip, _frozen, _constant, _negated_lazily, _empty,
]  # fmt: skip


@kernels
@pytest.mark.parametrize("change", RIGHT)
def test_what_changed_is_computed_as_if_for_the_first_time(op: str, change: Change) -> None:
    xs = leaves(op)
    before = [everything(op, xs) for _ in range(2)][-1]
    changed = copy.deepcopy(xs)
    change(changed)
    want = afresh(op, changed)
    if change in (_other_strides, _negated_lazily):  # the same values
        outputs = slice(len(CALLS[op].function("cpu")(*xs)))
        assert_same(want[outputs], before[outputs])
    for _ in range(2):
        assert_same(everything(op, changed), want)
    assert_same(everything(op, xs), before)


@kernels
def test_the_circumstances_are_part_of_a_call(op: str) -> None:
    """Autocast on, with either dtype, and off; gradients on and off; inference mode."""
    xs = leaves(op)
    modes: list[Callable[[], Any]] = [
        lambda: torch.autocast("cpu", enabled=False),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
        torch.no_grad,
        torch.inference_mode,
    ]
    want = []
    for mode in modes:
        with mode():
            want.append(afresh(op, xs))
    pairs = list(zip(modes, want, strict=True))
    for order in (pairs, pairs[::-1]):
        operator(op)._known = Signatures()
        for mode, answer in (*order, *order):
            with mode():
                found = everything(op, xs)
            assert_same(found, answer)
            assert [x.requires_grad for x in found] == [x.requires_grad for x in answer]
            assert [x.is_inference() for x in found] == [x.is_inference() for x in answer]


def test_autocasts_dtype_is_part_of_a_call() -> None:
    """Seen in the problem that the backend gets, since the native core computes in float32 on some processors."""
    xs = leaves("ffn")
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            y = CALLS["ffn"].function("cpu")(*xs)[0]
        assert y.grad_fn.call.compute == dtype  # type: ignore[union-attr]


def test_a_backend_that_is_gone_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    xs = leaves("ffn")
    everything("ffn", xs)
    monkeypatch.setattr(_native, "CORE", None)
    with pytest.raises(BackendError, match="cannot run this problem"):
        everything("ffn", xs)


def test_arguments_that_cannot_be_hashed_are_taken_and_forgotten() -> None:
    module = cast_kernels.BCAST(16, 8, 2, 2, 3)
    spatial, temporal = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 3, 16)
    windows: Any = ["time", "space"]
    call = {"num_heads": 2, "windows": windows}
    first = cast_kernels.bcast(spatial, temporal, module.gathered(), **call)
    assert_same(list(cast_kernels.bcast(spatial, temporal, module.gathered(), **call)), list(first))
    assert len(operator("bcast")._known) == 0


def test_the_memory_of_checked_calls_is_bounded() -> None:
    p = FFNParameters(*CALLS["ffn"].tensors(torch.float32)[1:])
    x = torch.randn(1, 16)
    for i in range(MOST_ARGUMENTS + 9):
        cast_kernels.ffn(x, p, eps=1e-5 * (i + 1), backend="cpu")
    assert len(operator("ffn")._known) == MOST_ARGUMENTS
    for i in range(MOST_LISTS + 9):
        cast_kernels.ffn(torch.randn(i + 2, 16), p, eps=1.0, backend="cpu")
    assert len(operator("ffn")._known) == MOST_ARGUMENTS - 1 + MOST_LISTS


def test_threads_share_the_memory() -> None:
    """Each thread alternates between the ops in two dtypes and two sizes; all answers are those of one thread."""
    cases = [(op, change) for _, op in KERNELS for change in (_other_values, _bfloat16, _double_clip)]
    made = []
    for op, change in cases:
        xs = leaves(op)
        change(xs)
        made.append((op, xs, afresh(op, xs)))
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            for op, xs, want in made:
                found = everything(op, xs)
                if not all(torch.equal(x, y) for x, y in zip(found, want, strict=True)):
                    wrong.append(op)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- the two ways ----------------------------------------------------------------------------------------------------


@kernels
def test_where_nothing_looks_no_operator_is_called(op: str, dispatched: list[str]) -> None:
    """Neither the first time nor the second; and both ways give the same bits."""
    xs = leaves(op)
    short = [everything(op, xs) for _ in range(2)]
    with torch.no_grad():
        CALLS[op].function("cpu")(*xs)
    assert dispatched == []
    with torch.profiler.profile() as profile:
        long = everything(op, xs)
    assert dispatched == [op, f"{op}_backward"]
    assert {f"cast_kernels::{name}" for name in dispatched} <= {event.name for event in profile.events()}
    for found in short:
        assert_same(found, long)


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@kernels
def test_modes_and_tracers_see_operators(op: str) -> None:
    xs = leaves(op)
    want = everything(op, xs)  # known from here on
    with _Seen() as seen:
        assert_same(everything(op, xs), want)
    assert {f"cast_kernels::{op}", f"cast_kernels::{op}_backward"} <= set(seen.names)
    with _Called() as called:
        assert_same(everything(op, xs), want)
    assert any(name == f"cast_kernels.{op}.default" for name in called.names)
    graph = make_fx(lambda *tensors: everything(op, list(tensors)))(*xs)
    targets = {str(node.target) for node in graph.graph.nodes}
    assert {f"cast_kernels.{op}.default", f"cast_kernels.{op}_backward.default"} <= targets
    assert_same(list(graph(*xs)), want)


@kernels
def test_below_autograd_nothing_is_differentiated(op: str) -> None:
    """As in the kernel of another library's operator, whose own derivative stands for all of it."""
    xs = leaves(op)
    everything(op, xs)
    with torch._C._AutoDispatchBelowAutograd():
        for y in CALLS[op].function("cpu")(*xs):
            assert y.grad_fn is None


@kernels
def test_hooks_on_what_is_kept_see_it(op: str) -> None:
    """What backward reads is kept by autograd's own means: hooks may offload it, and changes in place are noticed."""
    xs, packed = leaves(op), []
    want = everything(op, xs)

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = CALLS[op].function("cpu")(*xs)
    assert len(packed) == len(xs) + 1
    assert_same([*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), xs)], want)
    outputs = CALLS[op].function("cpu")(*xs)
    with torch.no_grad():
        xs[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(y.sum() for y in outputs).backward()  # type: ignore[union-attr]


def test_a_tensor_twice_is_right() -> None:
    """Guards do not know such lists again; the call is checked each time."""
    p = CALLS["ffn"].tensors(torch.float32)
    twice = [*p[:2], p[1], *p[3:]]  # the norm's weight for its bias
    assert_same(everything("ffn", twice), everything("ffn", [*p[:2], p[1].clone(), *p[3:]]))
    assert len(operator("ffn")._known) == 1


def test_a_list_takes_no_more_tensors_than_it_tells_apart() -> None:
    assert _signatures.listed(None, None)[0] is not _signatures.listed(None, None)[1]
    with pytest.raises(ValueError, match="zip"):
        _signatures.listed(*[None] * 49)
    assert _operator.Call((1,), "cheap", torch.float32, 2, "cpu").arguments() == (1, "cheap", torch.float32, 2, "cpu")
