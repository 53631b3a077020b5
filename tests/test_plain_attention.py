"""What attends, asked for by name, where the attention or the exchange is called instead of read."""

from __future__ import annotations

import pytest
import torch
from bcast_cases import AWKWARD
from cast_models import set_layer, small_model, small_video
from torch import Tensor, nn

import cast_kernels


def test_an_attention_asked_for_by_name_attends_or_says_why_not() -> None:
    model, video = small_model(attention="sdpa"), small_video(small_model())
    want = model(video)
    model.blocks[0].get_submodule("attn").register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(video), want)
    for block in model.blocks:
        block.attend_by("flash-attn")
    with pytest.raises(cast_kernels.BackendError, match="flash-attn"):
        model(video)
    model = small_model(attention="sdpa")
    set_layer(model.blocks[0], "attn", nn.Identity())
    with pytest.raises(cast_kernels.BackendError, match=r"'sdpa' was asked for.*Identity.*attention='auto'"):
        model(video)
    for block in model.blocks:
        block.attend_by("auto")
    assert not torch.equal(model(video)["action"], want["action"])


@pytest.mark.parametrize("layer", ["t2s_cross", "attn", "clip_attn"])
def test_math_attends_where_a_layer_is_called(layer: str) -> None:
    """Second derivatives, which PyTorch's own attention lacks, so a name that got lost on the way raises."""
    model = small_model(attention="math", fused=False)
    want, video = model(small_video(model)), small_video(model).requires_grad_()
    for block in model.blocks:
        block.get_submodule(layer).register_forward_hook(lambda *_: None)
    found = model(video)
    torch.testing.assert_close(found, want)
    first = torch.autograd.grad(found["action"].square().sum(), video, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), video)[0]
    assert second.abs().max() > 0


def test_what_stands_in_an_exchange_s_place_takes_no_attention_by_name() -> None:
    class Nothing(nn.Module):
        def forward(self, asking: Tensor, answering: Tensor) -> Tensor:
            return asking

    module, streams = AWKWARD.module(backend="eager"), AWKWARD.inputs()
    set_layer(module, "s2t_cross", Nothing())
    module(*streams)
    module.attention = "math"
    with pytest.raises(cast_kernels.BackendError, match=r"'math' was asked for.*s2t_cross.*Nothing.*attention='auto'"):
        module(*streams)
