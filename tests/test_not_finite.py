"""NaN, Inf and overflow through the whole fused model: they stay where eager PyTorch has them, and a scaler finds them.

On the `cpu` backend, and on `triton` from compiled GPU code in emulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cast_models import randomise, small_video
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import offline_driver
from ptx_emulator.triton.launcher import Emulator
from torch import Tensor

import cast

FP16, BF16 = torch.float16, torch.bfloat16

#: As small as every kernel takes: 2 frames of 4 patches, head dims 32 and 16. The last block has no exchange, so that
#: every parameter of the one before it has a gradient.
TINY: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "num_frames": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0,
    "exchange_layers": (0,), "heads": {"verb": 9, "noun": 7},
}  # fmt: skip
VALUES = [float("nan"), float("inf"), -float("inf")]


def tiny_model(backend: str, recompute: str = "auto") -> cast.CAST:
    model = cast.CAST(fused=backend != "eager", recompute=recompute, **TINY).train()
    randomise(model, 3)
    return model.fuse(backend) if backend != "eager" else model.unfuse("math")  # sdpa answers a NaN query with zeros


@contextmanager
def running(backend: str) -> Iterator[None]:
    """Let the kernels of `triton` run from PTX for an H100."""
    if backend != "triton":
        yield
        return
    with offline_driver(target("sm_90"), Emulator()) as emulator:
        yield
    assert {"exchange", "exchange_backward", "adapter_forward", "adapter_backward"} <= emulator.runs.keys()


def video(clips: int = 3) -> Tensor:
    return small_video(tiny_model("eager"), batch=clips, dtype=torch.float32)


def step(model: cast.CAST, clips: Tensor, autocast: torch.dtype | None) -> dict[str, Tensor]:
    """Logits, and the gradients of the clips and of all parameters that train."""
    clips = clips.clone().requires_grad_()
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        logits = model(clips)
    torch.stack([x.float().square().mean() for x in logits.values()]).sum().backward()
    assert clips.grad is not None
    found = {f"logits {name}": x.detach() for name, x in logits.items()} | {"clips": clips.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("backend", "autocast"), [("cpu", None), ("triton", BF16)], ids=["cpu", "triton"])
def test_clips_that_are_not_finite_spoil_no_other(backend: str, autocast: torch.dtype | None) -> None:
    """One pixel of the first clip and one of the last: their logits and gradients are not finite, as in eager, and the
    clip between them keeps its bits."""
    spoilt = video()
    spoilt[0, 0, 3, 5, 2], spoilt[2, 1, 1, 9, 9] = float("nan"), -float("inf")
    with running(backend):
        healthy, ours = (step(tiny_model(backend), clips, autocast) for clips in (video(), spoilt))
    eager = step(tiny_model("eager"), spoilt, autocast)
    trained = {name for name, p in tiny_model("eager").named_parameters() if p.requires_grad}
    assert ours.keys() == eager.keys() == {"logits verb", "logits noun", "clips", *trained}
    for name, found in ours.items():
        assert torch.equal(found.isfinite(), eager[name].isfinite()), name
        if name in trained:
            assert not found.isfinite().all(), "a loss that is not finite reaches every parameter"
        else:
            assert not found[::2].isfinite().any(), name
            assert torch.equal(found[1], healthy[name][1]), name


def scaled_step(
    model: cast.CAST, autocast: torch.dtype | None, scale: float, shrink: float = 1.0
) -> tuple[float, dict[str, bool], bool]:  # fmt: skip
    """One step with PyTorch's scaler, heads frozen so that it has to find what passed through the blocks.

    Returns:
        Its new scale; whether each gradient is finite; whether the optimizer moved anything.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and not name.startswith("head"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        loss = torch.stack([(x.float() * shrink).square().mean() for x in model(video(2)).values()]).sum()
    assert loss.isfinite()
    scaler.scale(loss).backward()
    finite = {name: bool(p.grad.isfinite().all()) for name, p in model.named_parameters() if p.grad is not None}
    scaler.step(optimizer)
    scaler.update()
    moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    return scaler.get_scale(), finite, moved


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_scaler_finds_an_overflow(backend: str) -> None:
    """One in the heads' fp16 products, which our backward gets and passes on."""
    with running(backend):
        ours = scaled_step(tiny_model(backend), FP16, 2.0**24)
    eager = scaled_step(tiny_model("eager"), FP16, 2.0**24)
    assert ours == eager
    assert ours[0] == 2.0**23
    assert not ours[2], "the step was not skipped"
    assert not any(ours[1].values())


#: What the last norms multiply by: logits, which the loss divides again, and so the streams' gradients beside theirs.
STEEP = 256.0


def steep_model(backend: str) -> cast.CAST:
    model = tiny_model(backend)
    with torch.no_grad():
        model.clip_ln_post.weight.mul_(STEEP)
        model.vmae_fc_norm.weight.mul_(STEEP)
    return model


def test_a_scaler_finds_what_overflows_inside_of_a_block() -> None:
    """Where a gradient of the float32 streams is rounded to fp16, in which backend `cpu` does not compute."""
    scale = 2.0**24
    eager = scaled_step(steep_model("eager"), FP16, scale, 1 / STEEP)
    with running("triton"):
        ours = scaled_step(steep_model("triton"), FP16, scale, 1 / STEEP)
    for found in (eager, ours):
        assert all(finite for name, finite in found[1].items() if name.startswith(("clip_ln_post", "vmae_fc_norm")))
        assert not any(finite for name, finite in found[1].items() if name.endswith("MLP_Adapter.D_fc1.weight"))
        assert found[0] == scale / 2
        assert not found[2], "the step was not skipped"
