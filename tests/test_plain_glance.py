"""Layers that were found plain before are looked at again at every call, quickly, and as strictly.

`tests/test_plain.py` changes every layer before and after calls; here is what a change of a layer's class, of an
attribute or of the tree may slip past.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bcast_cases import AWKWARD, CASES, Case, small
from cast_models import small_model, small_video
from torch import Tensor, nn

from cast_kernels import BCAST, DIRECTIONS, CrossAttention, plain

pytestmark = pytest.mark.filterwarnings("ignore:.*by its modules")  # which the tests cause on purpose


def known(case: Case = AWKWARD) -> tuple[BCAST, tuple[Tensor, ...]]:
    """An exchange whose layers were found plain, and its inputs."""
    module, inputs = case.module(), case.inputs()
    module(*inputs)
    return module, inputs


def afresh(module: BCAST, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the module answers when every layer is looked at the long way."""
    glance = plain._GLANCES.pop(module, None)
    answer = module(*inputs)
    plain._GLANCES.pop(module, None)
    if glance is not None:
        plain._GLANCES[module] = glance
    return answer


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_glance_reads_what_the_long_way_reads(case: Case) -> None:
    module = case.module(torch.float32)
    module(*case.inputs(torch.float32))
    found = module._at_a_glance()
    windows = [w for d, w in zip(DIRECTIONS, case.windows, strict=True) if d in case.directions]
    assert (found is None) == (case.positions and "space-time" in windows)  # whose table is the sum of two
    if found is not None:
        assert all(x is y for x, y in zip(found.flat(), module.gathered().flat(), strict=True))


def test_half_a_block_is_read_at_a_glance() -> None:
    model = small_model().float()
    model(small_video(model, dtype=torch.float32))
    owners = [layer for block in model.blocks for layer in (block.S_Adapter, block.T_Adapter, block.S_MLP_Adapter)]
    assert all(owner in plain._GLANCES for owner in owners)


def _no_positions(module: BCAST) -> None:
    module.t2s_cross.positions = False  # type: ignore[union-attr, assignment]


def _another_window(module: BCAST) -> None:
    case = small(windows=("space", "space"))
    module.windows = ("space", "space")
    module.t2s_cross = case.module().t2s_cross


def _without_positions(module: BCAST) -> None:
    module.s2t_cross = small(positions=False).module().s2t_cross


def _a_shadow(module: BCAST) -> None:
    """As wrappers put views: the attribute is found before the parameter."""
    module.cross_s_down.__dict__["weight"] = 2 * module.cross_s_down.weight.detach()


def _another_parameter(module: BCAST) -> None:
    module.cross_t_down.weight = nn.Parameter(3 * module.cross_t_down.weight.detach())


def _a_plain_tensor(module: BCAST) -> None:
    """As `torch.func.functional_call` swaps them."""
    module.cross_t_down._parameters["weight"] = 3 * module.cross_t_down.weight.detach()


def _another_layer(module: BCAST) -> None:
    module.cross_s_down = copy.deepcopy(module.cross_s_down)
    with torch.no_grad():
        module.cross_s_down.weight.mul_(2)


def _another_epsilon(module: BCAST) -> None:
    module.ln_s_cross.eps = 0.1


def _own_reading(module: BCAST) -> None:
    module.cross_s_down.reading = plain.BARE_LINEAR._replace(forward=nn.LayerNorm.forward)  # type: ignore[assignment]


CHANGES: list[Callable[[BCAST], None]] = [
    _no_positions, _another_window, _without_positions, _a_shadow, _another_parameter, _a_plain_tensor, _another_layer,
    _another_epsilon, _own_reading,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_after_a_glance_is_seen(change: Callable[[BCAST], None]) -> None:
    module, inputs = known()
    before = module(*inputs)
    change(module)
    want = afresh(module, inputs)
    for _ in range(2):
        got = module(*inputs)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    same = all(torch.equal(x, y) for x, y in zip(got, before, strict=True))
    assert same == (change is _own_reading)


@pytest.mark.parametrize("hook", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("name", ["ln_t_cross", "t2s_cross", "s2t_cross.t2s_proj"])
def test_a_hook_of_any_kind_ends_it_and_its_removal_brings_it_back(name: str, hook: str) -> None:
    module, _ = known()
    handle = getattr(module.get_submodule(name), f"register_{hook}")(lambda *_: None)
    assert module._at_a_glance() is None
    handle.remove()
    assert module._at_a_glance() is not None


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, CrossAttention])
@pytest.mark.parametrize("patched", ["forward", "__call__", "_call_impl"])
def test_a_patch_of_a_class_is_seen(kind: Any, patched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = known()
    plainly, seen = getattr(kind, patched), []

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return plainly(self, *args, **kwargs)

    monkeypatch.setattr(kind, patched, call)
    module(*inputs)
    assert seen


def test_glances_outlive_no_module_and_copies_have_their_own() -> None:
    module, inputs = known()
    want, held = module(*inputs), len(plain._GLANCES)
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        made.cross_s_down.register_forward_hook(lambda *_: None)
        assert made._at_a_glance() is None
        torch.testing.assert_close(made(*inputs), want)
    assert module._at_a_glance() is not None
    del module, made
    gc.collect()
    assert len(plain._GLANCES) < held
