"""One training step of a whole CAST whose kernels run from compiled GPU code, against fp64 and eager.

The model, its dispatch ("auto"), autograd and the optimizer are the product's own; the driver compiles for the GPU and
the emulator runs what it compiled. Exchange, the experts' adapters, their FFNs' norms and activations all pass
through it; the experts' dense products and attention are PyTorch's, here as on a GPU.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bcast_cases import assert_at_most_twice_eager
from cast_models import randomise
from kernel_cache import offline
from ptx_emulator.targets import target
from ptx_emulator.triton.launcher import Emulator
from torch import Tensor

import cast
from cast_kernels.evidence.cases import poisoned_memory

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

#: Head dims 32 in the experts and 16 in the exchange, adapters of 16 channels, 2 frames of 4 patches. The exchange is
#: in the first block: behind the last one no patch of the spatial stream is read, so half of it would have no gradient.
TINY: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "num_frames": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0,
    "exchange_layers": (0,), "drop_path": 0.5, "heads": {"verb": 64, "noun": 48},
}  # fmt: skip

#: Every kernel of the product.
KERNELS = {
    "project", "exchange", "exchange_backward", "attention_backward", "project_backward", "position_sums",
    "position_products", "reduce_rows", "weight_gradient", "sum_parts", "adapter_forward", "adapter_backward",
    "norm", "norm_backward", "activate", "activate_backward",
}  # fmt: skip


def tiny_model(dtype: torch.dtype) -> cast.CAST:
    model = cast.CAST(fused=True, **TINY)
    return randomise(model, 3).to(dtype).train()  # type: ignore[return-value]


def draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop-path factors of 0 and 2, which every dtype holds, the same in each run: the draw is no subject here."""

    def drawn(shape: tuple[int, ...], rate: float, like: Tensor) -> Tensor:
        assert rate == 0.5
        return 2.0 * (torch.arange(shape[0], device=like.device) % 2 == 0).to(like.dtype)

    monkeypatch.setattr("cast.model.block.drop_factor", drawn)


def train_step(model: cast.CAST, autocast: torch.dtype | None, eps: float) -> dict[str, Tensor]:
    """Logits, every gradient, and what the optimizer did to all parameters, in float64."""
    generator = torch.Generator().manual_seed(5)
    config, kind = model.config, model.clip_conv1.weight.dtype
    video = torch.randn((2, 3, config.num_frames, config.image_size, config.image_size), generator=generator)
    video = video.to(BF16).to(kind)  # the same numbers in each dtype
    labels = {"verb": torch.tensor([1, 40]), "noun": torch.tensor([6, 0])}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    # AdamW's usual 1e-8 is zero in fp16, and so are the squares of these gradients: eager's update is NaN with it.
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, eps=eps)
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        logits = model(video)
    wide = torch.promote_types(kind, FP32)
    loss = sum(F.cross_entropy(logits[name].to(wide), label) for name, label in labels.items())
    assert isinstance(loss, Tensor)
    loss.backward()
    optimizer.step()
    result = {f"logits.{name}": x for name, x in logits.items()} | {"loss": loss}
    result |= {f"grad.{name}": p.grad for name, p in trained.items() if p.grad is not None}
    moved = [(p.detach().double() - before[name]).flatten() for name, p in model.named_parameters()]
    result["update"] = torch.cat(moved)
    return {name: x.detach().double() for name, x in result.items()}


def check(name: str, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """Run the step three times and hold ours to eager's error."""
    model, eps = tiny_model(dtype), 1e-3 if dtype == FP16 else 1e-8
    exact = train_step(copy.deepcopy(model).double().fuse("eager"), None, eps)
    eager = train_step(copy.deepcopy(model).fuse("eager"), autocast, eps)
    with offline(target(name), Emulator()) as emulator, poisoned_memory():
        ours = train_step(model, autocast, eps)
    trained = {f"grad.{name}" for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= ours.keys()
    assert len(trained) > 60
    assert all(tensor.any() for tensor in exact.values())
    assert emulator.runs.keys() >= KERNELS, KERNELS - emulator.runs.keys()
    check_loss(ours, eager, exact)
    assert_at_most_twice_eager(ours, eager, exact)


def check_loss(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Take the loss out and compare it: one number, whose error in eager may be next to nothing by luck.

    To first order the logits' errors enter with softmax minus target, whose norm is about one: as large as they are.
    """
    loss, truth = (float(step.pop("loss")) for step in (ours, exact))
    eager.pop("loss")
    heads = [name for name in exact if name.startswith("logits.")]
    allowed = 2 * sum(float((eager[name] - exact[name]).square().mean().sqrt()) for name in heads)
    assert abs(loss - truth) <= allowed, f"loss {loss}, in fp64 {truth}; the logits' errors allow {allowed:.1e}"


#: Mixed precision, as models are trained, and bfloat16 throughout.
FAST = [("sm_80", FP32, BF16), ("sm_90", BF16, None)]
ALL = [
    (name, *kinds) for name in ("sm_80", "sm_90") for kinds in ((FP32, BF16), (BF16, None), (FP16, None), (FP32, None))
]


@pytest.mark.parametrize(("name", "dtype", "autocast"), FAST, ids=str)
def test_a_training_step_runs_from_compiled_code(
    name: str, dtype: torch.dtype, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(monkeypatch)
    check(name, dtype, autocast)


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "dtype", "autocast"), [case for case in ALL if case not in FAST], ids=str)
def test_a_training_step_in_every_dtype(
    name: str, dtype: torch.dtype, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(monkeypatch)
    check(name, dtype, autocast)
