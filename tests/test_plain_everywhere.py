"""What looks at every module of the process, a global hook or a patch of PyTorch's own call, sees every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cast_models import small_model, small_video
from test_plain import LAYERS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cast_kernels import plain

pytestmark = pytest.mark.filterwarnings("ignore:.*by its modules")  # which the tests cause on purpose


def test_a_global_hook_sees_every_layer_and_flop_counting_changes_nothing() -> None:
    model, seen = small_model().float(), set()
    names = {module: name for name, module in model.named_modules()}
    video = small_video(model, dtype=torch.float32)
    model(video)  # every layer is found plain
    with FlopCounterMode(display=False):
        assert plain.global_obstacle() == ""
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(names[module]))
    try:
        model(video)
        assert "global hook" in model.explain()
    finally:
        handle.remove()
    assert {f"blocks.1.{name}" for name in LAYERS} <= seen
    assert "global hook" not in model.explain()


@pytest.mark.parametrize("patched", ["__call__", "_call_impl"])
def test_a_patch_of_every_modules_call_sees_every_layer(patched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small_model().float(), set()
    names = {module: name for name, module in model.named_modules()}
    video = small_video(model, dtype=torch.float32)
    want, plainly = model(video), getattr(nn.Module, patched)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.add(names[self])
        return plainly(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, patched, call)
    torch.testing.assert_close(model(video), want)
    assert {f"blocks.1.{name}" for name in LAYERS} <= seen
    assert "was replaced, for every module" in model.explain()
