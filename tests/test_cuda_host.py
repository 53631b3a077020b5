"""Host code of backend `cuda`, launches kept, none executed: which tensors go as they are, where gradients lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from cuda_cases import ODD, needs_kernels
from torch import Tensor, nn

from cast_kernels import _native
from cast_kernels.cuda import bcast, common
from cast_kernels.evidence.cases import Case
from cast_kernels.evidence.cuda_launches import CudaLaunch, kept
from cast_kernels.problem import Parameters, Problem

pytestmark = needs_kernels

CASE = replace(ODD, batch=2, frames=2, patches=9, dim=64)
BF16 = torch.bfloat16


def posed(case: Case, compute: torch.dtype = BF16) -> Problem:
    t2s, s2t = (
        window if way in case.directions else None for way, window in zip(("t2s", "s2t"), case.windows, strict=True)
    )
    return Problem(
        case.batch, case.frames, case.patches, case.dim, case.bottleneck, case.heads, t2s, s2t, BF16, "cpu",
        None if compute == BF16 else compute,
    )  # fmt: skip


class Given:
    """A call of the backend."""

    def __init__(self, case: Case = CASE, dtype: torch.dtype = BF16) -> None:
        self.problem = posed(case)
        self.x = list(case.inputs(BF16))
        self.flat = [None if one is None else one.detach().contiguous() for one in case.module(dtype).gathered().flat()]
        self.scales: list[Tensor | None] = [None, None]
        self.grads = [torch.randn_like(x) for x in self.x]

    @property
    def parameters(self) -> Parameters:
        return Parameters.from_flat(self.flat)

    def forward(self) -> tuple[Tensor, ...]:
        return bcast.forward(self.problem, *self.x, self.parameters, *self.scales, 1e-6, "nothing")

    def backward(self, saved: Tensor, wanted: tuple[bool, ...] = (True,) * 30) -> list[Tensor | None]:
        return bcast.backward(
            self.problem, *self.x, self.parameters, saved, *self.scales, 1e-6, "nothing", *self.grads, wanted
        )


@pytest.fixture
def launches() -> Iterator[list[CudaLaunch]]:
    with kept() as found:
        yield found


def addresses(launches: list[CudaLaunch]) -> set[int]:
    return {place["address"] for launch in launches for place in launch.places}


def test_what_kernels_can_read_goes_to_them_as_it_is(launches: list[CudaLaunch]) -> None:
    given = Given()
    *_, saved = given.forward()
    given.backward(saved)
    tensors = [x for x in (*given.x, *given.flat, *given.grads, saved) if x is not None]
    assert {x.data_ptr() for x in tensors} <= addresses(launches)


def _strided(x: Tensor) -> Tensor:
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def _moved(x: Tensor) -> Tensor:
    space = torch.zeros(x.numel() + 1, dtype=x.dtype)
    space[1:] = x.flatten()
    return space[1:].view_as(x)


class Own(Tensor):
    """A type that PyTorch does not know."""


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "strides": _strided,
    "an address": _moved,
    "a dtype": lambda x: x.double(),
    "a type": lambda x: x.as_subclass(Own),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("what", ["x", "flat", "grads", "saved"])
def test_what_kernels_cannot_read_is_copied_for_them(what: str, change: str, launches: list[CudaLaunch]) -> None:
    given = Given()
    *_, saved = given.forward()
    given.backward(saved)
    count = len(launches)
    launches.clear()
    if what == "saved":
        changed = saved = CHANGES[change](saved)
    else:
        tensors: list[Any] = getattr(given, what)
        changed = tensors[1] = CHANGES[change](tensors[1])
    *outputs, again = given.forward()
    grads = given.backward(saved)
    wide = "fp32" if change == "a dtype" and what in ("x", "flat") else "bf16"
    assert (changed.data_ptr() in addresses(launches)) == (change == "a type")
    assert len(launches) == count
    assert any(wide in one.kernel for one in launches)
    for x, y in zip([*given.x, *given.x, *given.flat], [*outputs, *grads], strict=True):
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert y.is_contiguous()
    assert again.dtype == torch.float32


def test_drop_paths_factors_are_widened(launches: list[CudaLaunch]) -> None:
    given = Given()
    given.scales = [torch.ones(2, 10, dtype=BF16), torch.ones(2, 1, dtype=BF16)]
    *_, saved = given.forward()
    given.backward(saved)
    before = [one.kernel for one in launches]
    launches.clear()
    given.scales = [x.float() for x in given.scales if x is not None]
    *_, saved = given.forward()
    given.backward(saved)
    assert [one.kernel for one in launches] == before
    assert {x.data_ptr() for x in given.scales if x is not None} <= addresses(launches)


@pytest.mark.parametrize("directions", [("t2s", "s2t"), ("t2s",), ("s2t",)])
@pytest.mark.parametrize("positions", [True, False])
def test_gradients_of_equally_wide_rows_share_an_allocation(
    directions: tuple[str, ...], positions: bool, launches: list[CudaLaunch]
) -> None:
    case = replace(CASE, directions=directions, positions=positions)
    given = Given(case)
    *_, saved = given.forward()
    grads = given.backward(saved)
    names = common.kernels().present(given.parameters)
    assert [bool(names >> i & 1) for i in range(28)] == [x is not None for x in given.flat]
    found = []
    for x, grad in zip([*given.x, *given.flat], grads, strict=True):
        assert (grad is None) == (x is None)
        if x is not None and grad is not None:
            assert (grad.shape, grad.dtype, grad.is_contiguous()) == (x.shape, x.dtype, True)
            assert grad.data_ptr() % common.ALIGNMENT == 0
            found.append((grad.data_ptr(), grad.data_ptr() + grad.numel() * grad.element_size(), grad))
    for (_, stop, _), (start, _, _) in pairwise(sorted(found, key=lambda one: one[0])):
        assert stop <= start
    written = [grad for start, _, grad in found if start in addresses(launches)]
    storages = {
        (grad.shape[1:] if grad.ndim < 3 else grad.shape, grad.untyped_storage().data_ptr()) for grad in written
    }
    assert len(storages) == len({shape for shape, _ in storages})


def test_only_what_is_wanted_is_there(launches: list[CudaLaunch]) -> None:
    given = Given()
    *_, saved = given.forward()
    for chosen in ((0,), (1, 2), (5, 6, 29), (28,)):
        grads = given.backward(saved, tuple(i in chosen for i in range(30)))
        assert [i for i, grad in enumerate(grads) if grad is not None] == list(chosen)
    launches.clear()
    assert given.backward(saved, (False,) * 30) == [None] * 30
    assert launches == []


def test_tensors_are_read_by_their_attributes_where_there_is_no_table(
    launches: list[CudaLaunch], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, kernels, dtypes = Given(), _native.cuda(), tuple(common.NUMBERS)
    assert common.HAS_TABLE
    *_, saved = given.forward()
    given.backward(saved)
    before = [(one.kernel, one.grid, len(one.places)) for one in launches]
    launches.clear()
    try:
        assert not kernels.read_tensors_by(None, common.TYPES, dtypes)
        *_, saved = given.forward()
        given.backward(saved)
        given.x[0] = _strided(given.x[0])
        strided = given.x[0].data_ptr()
        given.forward()
    finally:
        common._read_tensors()
    assert [(one.kernel, one.grid, len(one.places)) for one in launches[: len(before)]] == before
    assert {x.data_ptr() for x in given.flat if x is not None} <= addresses(launches)
    assert strided not in addresses(launches)


def test_wrong_calls_of_the_module_are_refused(launches: list[CudaLaunch]) -> None:
    given = Given()
    plan = bcast._plan_for(given.problem, given.x[0], given.parameters, 1e-6, "nothing").native
    no = (None, None)
    with pytest.raises(ValueError, match="two streams"):
        plan.forward(tuple(given.x)[:1], given.parameters, no, no, given.x[0], given.x[0], 0)
    with pytest.raises(ValueError, match="four owners"):
        _native.cuda().present(given.parameters[:3])
    with pytest.raises(TypeError, match="6, 6, 8 and 8"):
        _native.cuda().present((given.parameters.t2s, *given.parameters[1:]))
    with pytest.raises(ValueError, match="a gradient, or None"):
        plan.backward(tuple(given.x), given.parameters, no, no, given.x[0], given.x[0], (), 0)
    assert not plan.forward((1, 2), given.parameters, no, no, given.x[0], given.x[0], 0)
    assert launches == []
    assert isinstance(nn.Parameter(given.x[0]), common.TYPES)
