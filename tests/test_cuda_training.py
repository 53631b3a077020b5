"""A training step of a whole CAST asked to run on backend `cuda`, from compiled GPU code, against fp64 and eager.

B-CAST runs by the kernels of csrc/cuda, and the experts' ops by Triton's, to which that backend leaves them. Both kinds
of launches are taken in the one step: the emulator executes nvcc's PTX and Triton's. All the rest is the product's own.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from bcast_cases import assert_at_most_twice_eager
from cast_models import randomise
from cuda_cases import needs_kernels
from kernel_cache import offline
from ptx_emulator.targets import target
from ptx_emulator.triton.launcher import Emulator
from test_emulated_training import BF16, FP16, FP32, KERNELS, check_loss, draws, train_step
from torch import Tensor

import cast
from cast_kernels import _native
from cast_kernels.evidence.cases import poisoned_memory
from cast_kernels.evidence.cuda_launches import emulated

pytestmark = needs_kernels

#: A bottleneck of 192 channels, and heads of 32 in it; heads of 16 and adapters of 48 channels in the experts; 2 frames
#: of 4 patches. As in `test_emulated_training` the exchange is in the first block.
TINY: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "num_frames": 4, "embed_dim": 96, "depth": 2, "num_heads": 6, "mlp_ratio": 1.0,
    "adapter_ratio": 0.5, "down_ratio": 0.5, "exchange_layers": (0,), "drop_path": 0.5,
    "heads": {"verb": 64, "noun": 48},
}  # fmt: skip
#: The same with a bottleneck of 384 channels and heads of 64, as windows go in Table 1(e).
WIDE = TINY | {"down_ratio": 0.25, "windows": ("space-time", "space-time")}
#: Kernels of csrc/cuda in their order, in a step whose backward computes again what is cheap.
EXCHANGE = (
    "prepare", "project", "attention", "exchange",
    "prepare", "project_again", "exchange", "exchange_backward", "attention_backward", "project_backward",
    "position_sums", "weight_gradient", "finish",
)  # fmt: skip
#: What a rehearsal of both backends launches. By default forward keeps everything, so nothing is projected again.
OF_BOTH = KERNELS | (
    {f"bcast_{name}" for name in {*EXCHANGE} - {"project_again"}} if _native.CUDA is not None else set()
)
#: Triton's kernels of the same step, and those of its own exchange, which are none of it.
EXPERTS = {"adapter_forward", "adapter_backward", "norm", "norm_backward", "activate", "activate_backward"}
NONE_OF_IT = KERNELS - EXPERTS - {"weight_gradient", "sum_parts", "reduce_rows"}


class Schedule(NamedTuple):
    """When copies land, and the seed of warps' priorities: of both kinds of launches."""

    landing: str = "late"
    seed: int | None = None


class Ran(NamedTuple):
    """A step from compiled code: what it computed, and the kernels that did."""

    found: dict[str, Tensor]
    cuda: list[str]  # in their order
    triton: dict[str, int]  # launches


def fused(dtype: torch.dtype, sizes: dict[str, Any]) -> cast.CAST:
    model = cast.CAST(fused=True, backend="cuda", recompute="cheap", **sizes)
    return randomise(model, 3).to(dtype).train()  # type: ignore[return-value]


def step(model: cast.CAST, autocast: torch.dtype | None, eps: float, schedule: Schedule) -> Ran:
    options = schedule._asdict()
    with (
        offline(target("sm_90"), Emulator(**options)) as experts,
        emulated("sm_90", **options) as exchange,
        poisoned_memory(),
    ):
        found = train_step(copy.deepcopy(model), autocast, eps)
    return Ran(found, [one.launch.kernel for one in exchange], {k: r.launches for k, r in experts.runs.items()})


def check(
    dtype: torch.dtype, autocast: torch.dtype | None, sizes: dict[str, Any], schedules: tuple[Schedule, ...]
) -> None:
    """Hold the step to eager's error against fp64, and its bits to themselves under each schedule."""
    model, eps = fused(dtype, sizes), 1e-3 if dtype == FP16 else 1e-8
    exact = train_step(copy.deepcopy(model).double().fuse("eager"), None, eps)
    eager = train_step(copy.deepcopy(model).fuse("eager"), autocast, eps)
    ours, *again = (step(model, autocast, eps, schedule) for schedule in schedules)
    numbers = f"_{'fp16' if dtype == FP16 else 'bf16'}"
    assert tuple(name.removeprefix("bcast_").split(numbers)[0] for name in ours.cuda) == EXCHANGE
    assert ours.triton.keys() >= EXPERTS
    assert not ours.triton.keys() & NONE_OF_IT
    for other in again:
        assert (other.cuda, other.triton) == (ours.cuda, ours.triton)
        assert [name for name, x in ours.found.items() if not torch.equal(x, other.found[name])] == []
    trained = {f"grad.{name}" for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= ours.found.keys()
    assert len(trained) > 60
    assert all(tensor.any() for tensor in exact.values())
    check_loss(ours.found, eager, exact)
    assert_at_most_twice_eager(ours.found, eager, exact)


def test_a_training_step_runs_from_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """In what `cast train` runs, autocast to bf16, once; other dtypes and several schedules are heavy."""
    draws(monkeypatch)
    check(FP32, BF16, TINY, (Schedule("random", 1),))


ALL = (Schedule(), Schedule(), Schedule("early"), Schedule("random", 2))


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("dtype", "autocast", "sizes"),
    [(BF16, None, TINY), (FP32, BF16, TINY), (FP32, BF16, WIDE), (FP16, None, WIDE), (FP32, FP16, TINY)],
    ids=["bf16", "amp", "amp, d 384", "fp16, d 384", "amp to fp16"],
)
def test_a_training_step_under_every_schedule(
    dtype: torch.dtype, autocast: torch.dtype | None, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(monkeypatch)
    check(dtype, autocast, sizes, ALL)


def test_a_model_that_may_not_be_fused_takes_no_backend() -> None:
    with pytest.raises(ValueError, match="fused=False runs in eager PyTorch, and backend is 'cuda'; leave one out"):
        cast.CAST("tiny", fused=False, backend="cuda")
    with pytest.raises(ValueError, match="backend is 'cudda'; allowed: 'auto', 'triton', 'cuda', 'cpu', 'eager'"):
        cast.CAST("tiny", backend="cudda")
