"""Steps that are not finite, and precision: what stays as it was, and where gradients are added up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor
from training_cases import Batch, PointNet, PointSource, engine, planned, same

from cast.training import Checkpoints, DivergenceError, Engine
from cast.training.distributed import make_accelerator
from cast.training.tensors import read_moments


class _OnlyOnce(PointSource):
    """Good points, but for one micro-batch of one step."""

    bad_step = 3

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for number, batch in enumerate(super().batches(epoch, start), start=start):
            if epoch == 0 and number == self.bad_step:
                batch.video = batch.video * math.nan
            yield batch


def test_a_step_that_was_not_finite_reaches_no_checkpoint_and_no_state(tmp_path: Path) -> None:
    """All of it is launched before the host knows: the optimizer leaves weights, moments and its count alone."""
    net, plan = PointNet(), planned(checkpoint_every=1, ema=0.9, clip_grad=1.0)
    running = engine(tmp_path, net, _OnlyOnce(8), plan, keep=9)
    states: list[dict[str, Tensor]] = []

    def state() -> dict[str, Tensor]:
        assert running.average is not None
        inner = running.optimizer.optimizer
        moments = read_moments(net, inner)
        averages = {f"average {name}": x for name, x in running.average.read().items()}
        return {name: x.clone() for name, x in (net.state_dict() | moments | averages).items()}

    with pytest.raises(DivergenceError, match="step 3: the loss is nan"):
        running.run(lambda *_: states.append(state()))
    after = state()
    assert after.keys() == states[-1].keys()
    assert all(torch.equal(tensor, states[-1][name]) for name, tensor in after.items())
    assert all(float(x) == 3 for name, x in after.items() if name.endswith(":step"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (1, 2, 3)]
    again = PointNet()
    resumed = engine(tmp_path, again, plan=plan, keep=9)
    assert resumed.progress.step == 3
    assert same(again, net)


def test_fp16_skips_a_step_that_overflows_and_goes_on(tmp_path: Path) -> None:
    """With PyTorch's own scaler: weights, moments and average stay, the scale is halved, the log says skipped."""

    class Overflowing(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            Overflowing.calls += 1
            return grad * (math.inf if Overflowing.calls == 3 else 1.0)

    class Net(PointNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = Overflowing.apply(self.body(x))
            return {name: head(self.frozen(hidden)) for name, head in self.heads.items()}

    net, seen = Net(), []
    accelerator = make_accelerator()
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=128)
    checkpoints = Checkpoints(tmp_path, accelerator, {"plan": "test"}, net)
    running = Engine(net, PointSource(8), planned(epochs=1, ema=0.9), accelerator, checkpoints)
    inner = running.optimizer.optimizer
    with mock.patch.object(Accelerator, "unscale_gradients", side_effect=lambda: scaler.unscale_(inner)):
        running.run(lambda _, step: seen.append((step, scaler.get_scale(), net.body[0].weight.detach().clone())))
    assert [step.skipped for step, *_ in seen] == [False, False, True, False, False, False]
    assert [scale for _, scale, _ in seen] == [128, 128, 64, 64, 64, 64]
    weights = [weight for *_, weight in seen]
    assert [torch.equal(a, b) for a, b in pairwise(weights)] == [False, True, False, False, False]
    assert math.isinf(seen[2][0].grad_norm) or math.isnan(seen[2][0].grad_norm)
    plain = PointNet()  # without the third step
    source = PointSource(8)
    kept = [batch for n, batch in enumerate(source.batches(0)) if n != 2]
    source.batches = lambda epoch, start=0: iter(kept)  # type: ignore[method-assign]
    without = engine(tmp_path / "plain", plain, source, planned(epochs=1, steps_per_epoch=5, ema=0.9))
    without.run()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert running.average is not None
    assert without.average is not None
    torch.testing.assert_close(running.average.read(), without.average.read())


def test_fsdp2_leaves_precision_to_autocast_and_adds_gradients_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_training_launched.py, heavy, has two processes whose weights are DDP's under bf16."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.reduce_dtype == torch.bfloat16  # accelerate's
    monkeypatch.setattr(Accelerator, "distributed_type", "FSDP")
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    make_accelerator("bf16")
    policy = plugin.mixed_precision_policy
    assert policy.reduce_dtype == torch.float32
    assert policy.param_dtype is policy.output_dtype is None
    assert not policy.cast_forward_inputs
    monkeypatch.setattr(plugin, "fsdp_version", 1)
    with pytest.raises(ValueError, match=r"version 1 is not supported: give accelerate launch --fsdp_version 2"):
        make_accelerator("bf16")
