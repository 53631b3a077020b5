"""One training step of a small CAST(fused=True), all ops, executed from compiled GPU code on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cast import CAST
from cast_kernels.evidence.cases import compare, poisoned_memory
from cast_kernels.evidence.driver import offline_driver
from cast_kernels.evidence.emulator import Emulator
from cast_kernels.evidence.targets import target

SIZES: dict[str, Any] = {"depth": 1, "num_frames": 4, "image_size": 16, "num_heads": 2, "heads": {"action": 5}}


def step(weights: dict[str, Tensor], fused: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits and the gradient of everything that trains, in float64."""
    model = CAST("tiny", fused=fused, **SIZES)
    model.load_state_dict(weights)
    model.to(dtype)
    video = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = model(video.to(torch.bfloat16).to(dtype))["action"]
    logits.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach().double() for name, t in ({"logits": logits} | found).items()}


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_a_training_step(name: str) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    generator = torch.Generator().manual_seed(1)
    initial = CAST("tiny", **SIZES).state_dict()
    weights = {
        key: (0.05 * torch.randn(t.shape, generator=generator) + ("norm" in key or "ln_" in key) * ("weight" in key))
        .to(torch.bfloat16).float()
        for key, t in initial.items()
    }  # fmt: skip
    exact, eager = step(weights, False, torch.float64), step(weights, False, torch.bfloat16)
    emulator = Emulator()
    with offline_driver(target(name), emulator), poisoned_memory():
        ours = step(weights, True, torch.bfloat16)
    bad = [error for error in compare(ours, eager, exact) if not error.ok]
    assert not bad, bad
    assert {"project", "exchange", "adapter_forward", "adapter_backward", "norm_backward"} <= set(emulator.runs)
