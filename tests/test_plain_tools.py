"""Modules under what PyTorch and others do to them: functional calls, quantising, offloading, compiling, wrapping."""

from __future__ import annotations

import warnings

import pytest
import torch
from bcast_cases import AWKWARD
from cast_models import small_model, small_video
from test_plain import lora, tokens
from torch import nn


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_functional_call_takes_plain_tensors(backend: str) -> None:
    module = AWKWARD.module(backend=backend)
    other = {name: (p.detach() * 1.1).clone() for name, p in module.named_parameters()}
    got = torch.func.functional_call(module, other, AWKWARD.inputs())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(other[name])
    torch.testing.assert_close(got, module(*AWKWARD.inputs()))


def test_dynamic_quantisation_runs_the_quantised_layers() -> None:
    if not torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no quantised kernels")
    model = small_model().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has deprecated it for torchao
        int8 = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    calls: dict[str, int] = {}
    for name, module in int8.named_modules():
        if type(module).__name__ == "Linear" and "quantized" in type(module).__module__:
            module.register_forward_hook(lambda *_, name=name: calls.update({name: 1 + calls.get(name, 0)}))
    whole, got = tokens(model, torch.float32), tokens(int8, torch.float32)
    assert len([name for name in calls if name.startswith("blocks.")]) == 2 * 25
    assert set(calls.values()) == {1}
    for name, x in whole.items():
        assert 0 < float((got[name] - x).norm() / x.norm()) < 0.2
    assert "modules" in repr(int8)


def test_offloaded_weights_are_there_when_they_are_used() -> None:
    from accelerate import cpu_offload

    model, video = small_model().float(), small_video(small_model(), dtype=torch.float32)
    want = model(video)
    cpu_offload(model, execution_device="cpu")
    assert model.blocks[0].get_submodule("attn.qkv").weight.is_meta  # type: ignore[union-attr]
    torch.testing.assert_close(model(video), want)


def test_a_compiled_model_calls_its_layers_and_sees_a_later_hook() -> None:
    model, video = small_model(depth=1).float(), small_video(small_model(), dtype=torch.float32)
    lora(model.blocks[0], "attn.qkv")
    lora(model.blocks[0], "t2s_cross.t2s_q")
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(fast(video), model(video))
    before = model(video)["action"]
    model.blocks[0].get_submodule("mlp.fc1").register_forward_hook(lambda _, args, output: 2 * output)
    torch.testing.assert_close(fast(video), model(video))
    assert not torch.allclose(before, model(video)["action"])


def test_blocks_with_something_around_them_are_found() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, video = small_model(), small_video(small_model())
    want = model(video)
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    torch.testing.assert_close(model(video), want)
    assert [block.backend for _, block in model.unfuse().cast_blocks()] == ["eager"] * 2
    assert [name for name, _ in model.cast_blocks()] == ["blocks.0", "blocks.1._checkpoint_wrapped_module"]
