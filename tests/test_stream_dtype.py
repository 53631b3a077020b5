"""The model's option of 16-bit residual streams under autocast: where it acts, where not, and what it costs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bcast_cases import assert_at_most_twice_eager
from cast_models import randomise
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import offline_driver
from ptx_emulator.triton.launcher import Emulator
from torch import Tensor

import cast
from cast.training.settings import RunSettings
from cast_kernels.evidence.autocast import cuda_rules

BF16 = torch.bfloat16


def made(**options: object) -> cast.CAST:
    sizes = {"image_size": 16, "patch_size": 8, "num_frames": 4, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = cast.CAST(**sizes, mlp_ratio=1.0, exchange_layers=(0,), heads={"verb": 64, "noun": 48}, **options)
    return randomise(model, 3)  # type: ignore[return-value]


def video(model: cast.CAST) -> Tensor:
    config = model.config
    generator = torch.Generator().manual_seed(5)
    shape = (2, 3, config.num_frames, config.image_size, config.image_size)
    return torch.randn(shape, generator=generator).to(BF16).float()


def step(model: cast.CAST, autocast: torch.dtype | None) -> dict[str, Tensor]:
    """Logits and every gradient in float64."""
    kind = model.clip_class_embedding.dtype
    with cuda_rules(autocast):
        logits = model(video(model).to(kind))
    labels = {"verb": torch.tensor([1, 40]), "noun": torch.tensor([6, 0])}
    wide = torch.promote_types(kind, torch.float32)
    loss = sum(F.cross_entropy(logits[name].to(wide), label) for name, label in labels.items())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(trained.values()))  # type: ignore[arg-type]
    result = {f"logits.{name}": x for name, x in logits.items()} | dict(zip(trained, grads, strict=True))
    return {name: x.detach().double() for name, x in result.items()}


@pytest.mark.parametrize("fused", [True, False])
def test_every_block_sees_and_leaves_the_streams_dtype(fused: bool) -> None:
    for name, autocast, expected in (
        ("auto", True, torch.float32), ("autocast", True, BF16), ("autocast", False, torch.float32)
    ):  # fmt: skip
        model = made(fused=fused, stream_dtype=name)
        seen: list[torch.dtype] = []
        for block in model.blocks:
            block.register_forward_hook(lambda _, given, out, s=seen: s.extend(x.dtype for x in (*given, *out)))
        with torch.autocast("cpu", BF16, enabled=autocast):
            model(video(model))
        assert seen == [expected] * 8


def test_ours_with_16_bit_streams_is_as_near_as_eager_with_them() -> None:
    """Every kernel from compiled code, logits and all gradients, against fp64."""
    model = made(stream_dtype="autocast").train()
    exact = step(copy.deepcopy(model).double().fuse("eager"), None)
    eager = step(copy.deepcopy(model).fuse("eager"), BF16)
    with offline_driver(target("sm_80"), Emulator()):
        ours = step(model, BF16)
    assert_at_most_twice_eager(ours, eager, exact)


def test_16_bit_streams_cost_less_than_twice_the_error_of_the_logits() -> None:
    """Eager under CUDA's rules, the root mean square over four seeds of weights."""
    errors: dict[str, list[Tensor]] = {"auto": [], "autocast": []}
    for seed in range(4):
        model = randomise(made(fused=False), seed)
        assert isinstance(model, cast.CAST)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(video(model).double())
            for name, found in errors.items():
                model.stream_dtype = name
                with cuda_rules(BF16):
                    logits = model(video(model))
                found += [(logits[head].double() - exact[head]).flatten() for head in exact]
    auto, autocast = (float(torch.cat(found).square().mean().sqrt()) for found in errors.values())
    assert 0 < autocast <= 2 * auto


def test_checkpoints_do_not_know_of_it(tmp_path: Path) -> None:
    model = made(stream_dtype="autocast")
    model.save_pretrained(tmp_path)
    again = cast.CAST.from_pretrained(tmp_path)
    assert again.stream_dtype == "auto"
    assert again.state_dict().keys() == model.state_dict().keys()


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="stream_dtype is 'bf16'; allowed: 'auto', 'autocast'"):
        made(stream_dtype="bf16")
    model = made()
    with pytest.raises(ValueError, match="stream_dtype is 'half'"):
        model.stream_dtype = "half"


def test_a_training_without_autocast_cannot_ask_for_it() -> None:
    assert RunSettings().stream_dtype == "auto"
    assert RunSettings(stream_dtype="autocast").precision == "bf16"
    with pytest.raises(ValueError, match=r"run\.precision fp32, which has no autocast"):
        RunSettings(precision="fp32", stream_dtype="autocast")
