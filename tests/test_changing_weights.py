"""Packed weights kept between calls: served only while they hold, dropped when they cannot be needed."""

from __future__ import annotations

import gc

import pytest
import torch
from bcast_cases import Case

import cast_kernels
from cast_kernels import _native
from cast_kernels.cpu import packed

pytestmark = pytest.mark.skipif(_native.CORE is None, reason=f"nothing to test: {_native.REASON}")


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    packed.clear()


def infer(module: cast_kernels.BCAST) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([x.flatten() for x in module(*Case().inputs())])


def count_packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    pack = cast_kernels.cpu.bcast._pack

    def counting(*arguments: object) -> torch.Tensor:
        counted.append(1)
        return pack(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cast_kernels.cpu.bcast, "_pack", counting)
    return counted


def test_inference_packs_once_and_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    packings, module = count_packings(monkeypatch), Case().module(backend="cpu")
    first = infer(module)
    assert torch.equal(infer(module), first)
    assert len(packings) == 1
    assert packed.kept_bytes() > 0


@pytest.mark.parametrize("name", ["cross_s_down.weight", "s2t_cross.s2t_kv.weight", "cross_t_up.weight"])
@pytest.mark.parametrize("change", ["in place", "optimizer", "load_state_dict", "replaced", "data"])
def test_a_changed_weight_is_packed_again(name: str, change: str) -> None:
    module, other = Case().module(backend="cpu"), Case(seed=9).module(backend="cpu")
    before = infer(module)
    weight = module.get_parameter(name)
    owner = module.get_submodule(name.rpartition(".")[0])
    if change == "in place":
        with torch.no_grad():
            weight.mul_(1.5)
    elif change == "optimizer":
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.1).step()
    elif change == "load_state_dict":
        module.load_state_dict(module.state_dict() | {name: other.get_parameter(name)})
    elif change == "replaced":
        owner.weight = torch.nn.Parameter(other.get_parameter(name).detach().clone())
    else:
        weight.data = other.get_parameter(name).detach().clone()
    after = infer(module)
    assert not torch.equal(after, before)
    packed.clear()
    assert torch.equal(after, infer(module))


def test_a_new_weight_at_an_old_address_is_packed_again() -> None:
    module, other = Case().module(backend="cpu"), Case(seed=9).module(backend="cpu")
    before, name = infer(module), "cross_t_up"
    shape, address = module.cross_t_up.weight.shape, module.cross_t_up.weight.data_ptr()
    memory = module.cross_t_up.weight.data  # keeps the address
    module.cross_t_up.weight = torch.nn.Parameter(memory.copy_(other.get_parameter(f"{name}.weight")).view(shape))
    assert module.cross_t_up.weight.data_ptr() == address
    assert not torch.equal(infer(module), before)


def test_biases_and_tables_are_never_stale() -> None:
    module = Case().module(backend="cpu")
    before = infer(module)
    with torch.no_grad():
        module.get_parameter("cross_s_up.bias").add_(1.0)
    assert not torch.equal(infer(module), before)


def test_packed_weights_die_with_the_module() -> None:
    module = Case().module(backend="cpu")
    infer(module)
    assert packed.kept_bytes() > 0
    del module
    gc.collect()
    assert packed.kept_bytes() == 0


def test_training_drops_them() -> None:
    module = Case().module(backend="cpu")
    infer(module)
    sum(x.sum() for x in module(*Case().inputs())).backward()
    assert packed.kept_bytes() == 0


def test_inference_tensors_have_no_version_and_are_packed_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    packings = count_packings(monkeypatch)
    with torch.inference_mode():
        module = Case().module(backend="cpu")
        first = infer(module)
        module.cross_s_down.weight.mul_(2.0)
        assert not torch.equal(infer(module), first)
    assert len(packings) == 2
    assert packed.kept_bytes() == 0


def test_other_heads_share_the_packed_weights() -> None:
    """The panels depend on the weights' shapes only, so a module that changes its windows or heads stays right."""
    case = Case()
    module = case.module(backend="cpu")
    infer(module)
    module.num_heads = 2
    again = infer(module)
    packed.clear()
    assert torch.equal(again, infer(module))
