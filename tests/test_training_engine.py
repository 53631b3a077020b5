"""The engine's arithmetic: schedule, accumulation, clipping, averages, mixing, and what happens when it diverges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cast_models import small_model, small_video
from torch import Tensor, nn
from training_cases import Batch, PointNet, PointSource, engine, planned, same

from cast import CAST
from cast.training import Checkpoints, DivergenceError, Engine, Plan, Progress, Step, cosine, parameter_groups
from cast.training.distributed import deepspeed_settings
from cast.training.engine import classification, micro_seed

HAS_KERNELS = CAST("tiny", depth=1).blocks[0].chosen_backend() != "eager"  # type: ignore[operator,union-attr]


def test_schedule_is_the_published_one() -> None:
    """Against the formula of the published code, written with its own building blocks."""
    rate = cosine(2.0, 0.5, 6, 30)
    rise = np.linspace(0, 2.0, 6)
    fall = [0.5 + 0.5 * 1.5 * (1 + math.cos(math.pi * i / 24)) for i in range(24)]
    assert [rate(step) for step in range(30)] == pytest.approx([*rise, *fall])
    assert rate(0) == 0
    assert rate(5) == rate(6) == 2.0
    assert cosine(2.0, 0.5, 0, 30)(0) == 2.0
    with pytest.raises(ValueError, match="31 of 30"):
        cosine(2.0, 0.5, 31, 30)


def test_each_step_runs_at_its_rate_scaled_by_layer(tmp_path: Path) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.head = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.head(self.blocks[1](self.blocks[0](x)))
            return {"verb": y, "noun": y}

    plan = planned(epochs=1, rate=lambda step: 10.0**-step, layer_decay=0.5)
    running, seen = engine(tmp_path, Deep(), plan=plan), []
    running.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(sorted({group["lr"] for group in optimizer.param_groups}))
    )
    reports: list[Step] = []
    running.run(lambda progress, step: reports.append(step))
    assert seen == [pytest.approx([0.25 * 10.0**-s, 0.5 * 10.0**-s, 10.0**-s]) for s in range(6)]
    assert [report.lr for report in reports] == [10.0**-s for s in range(6)]
    for group in running.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
    decays = {group["weight_decay"] for group in parameter_groups(Deep(), 0.05, 1.0)}
    assert decays == {0.0, 0.05}


@pytest.mark.parametrize("clip", [None, 0.05])
def test_accumulation_equals_the_large_batch(tmp_path: Path, clip: float | None) -> None:
    nets, histories = [], []
    for accumulate in (1, 4):
        net = PointNet().double()
        plan = planned(accumulate=accumulate, micro_batch=8 // accumulate, clip_grad=clip)
        running = engine(tmp_path / str(accumulate), net, PointSource(plan.micro_batch, torch.float64), plan)
        histories.append(running.run().history)
        nets.append(net)
    assert not same(nets[0], PointNet().double())
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert histories[0] == [pytest.approx(entry) for entry in histories[1]]


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_gradient_is_clipped_if_asked_and_its_length_reported(tmp_path: Path, clip: float | None) -> None:
    running, lengths = engine(tmp_path, PointNet(), plan=planned(clip_grad=clip)), []

    def measure(optimizer: torch.optim.Optimizer, *_: object) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        lengths.append(math.sqrt(sum(float(grad.square().sum()) for grad in grads)))

    running.optimizer.optimizer.register_step_pre_hook(measure)
    reports: list[Step] = []
    running.run(lambda progress, step: reports.append(step))
    assert min(report.grad_norm for report in reports) > 2e-3  # type: ignore[type-var]
    if clip is None:
        assert lengths == pytest.approx([report.grad_norm for report in reports])
    else:
        assert lengths == pytest.approx([clip] * len(reports), rel=1e-2)


def test_the_average_follows_the_weights_and_survives_a_stop(tmp_path: Path) -> None:
    plan = planned(ema=0.8, checkpoint_every=1)
    net = PointNet()
    running, expected = engine(tmp_path / "whole", net, plan=plan), net.heads["verb"].weight.detach().clone()

    def follow(*_: object) -> None:
        expected.lerp_(net.heads["verb"].weight.detach(), 0.2)

    running.run(follow)
    assert running.average is not None
    average = running.average.read()
    torch.testing.assert_close(average["heads.verb.weight"], expected)
    assert "frozen.weight" not in average
    with running.average.applied():
        torch.testing.assert_close(net.heads["verb"].weight, expected)
    assert not torch.equal(net.heads["verb"].weight, expected)

    stopped = engine(tmp_path / "parts", PointNet(), plan=plan)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(lambda progress, step: _stop_at(progress.step, 5))
    again = engine(tmp_path / "parts", PointNet(), plan=plan)
    again.run()
    assert again.average is not None
    assert all(torch.equal(tensor, average[name]) for name, tensor in again.average.read().items())


@pytest.mark.parametrize("failing", [1, 2])
def test_a_validation_that_fails_is_done_again_and_no_step_is(tmp_path: Path, failing: int) -> None:
    """Only at the ends of epochs are there checkpoints; the second epoch is the last."""
    seen: list[int] = []
    broken = True

    def validate(model: nn.Module) -> dict[str, float]:
        if broken and len(seen) == 6 * failing:
            raise OSError("a damaged video")
        assert not model.training
        return {"val": float(model.heads["verb"].weight.detach().sum())}  # type: ignore[index,union-attr]

    def note(progress: Progress, step: Step) -> None:
        seen.append(progress.step)

    whole, net = PointNet(dropout=0.5), PointNet(dropout=0.5)
    broken = False
    expected = engine(tmp_path / "whole", whole).run(on_epoch=validate)
    broken = True
    for _ in range(2):  # also when it fails again
        with pytest.raises(OSError, match="a damaged video"):
            engine(tmp_path / "parts", PointNet(dropout=0.5)).run(note, validate)
    assert seen == list(range(1, 6 * failing + 1))
    broken = False
    progress = engine(tmp_path / "parts", net).run(note, validate)
    assert seen == list(range(1, 13))
    assert progress.history == expected.history
    assert [entry["epoch"] for entry in progress.history] == [1, 2]
    assert same(net, whole)
    assert engine(tmp_path / "parts", net).progress == progress  # what was completed is on the disk


def test_an_epoch_is_told_once_as_its_history_has_it(tmp_path: Path) -> None:
    """Before the checkpoint has it: what could not be told is told by the next run, which validates again."""
    told: list[tuple[int, int, dict[str, float]]] = []
    full = True

    def tell(progress: Progress, entry: dict[str, float]) -> None:
        if full and entry["epoch"] == 2:
            raise OSError("the disk is full")
        told.append((progress.step, len(progress.history), dict(entry)))

    with pytest.raises(OSError, match="the disk is full"):
        engine(tmp_path, PointNet()).run(on_entry=tell, on_epoch=lambda model: {"val": 1.0})
    full = False
    progress = engine(tmp_path, PointNet()).run(on_entry=tell, on_epoch=lambda model: {"val": 2.0})
    assert [(step, before) for step, before, _ in told] == [(6, 0), (12, 1)]
    assert [entry for _, _, entry in told] == progress.history
    assert [entry["val"] for entry in progress.history] == [1.0, 2.0]
    assert engine(tmp_path, PointNet()).epoch == 2


def _stop_at(step: int, at: int) -> None:
    if step == at:
        raise KeyboardInterrupt


def test_random_numbers_are_those_of_the_micro_batch(tmp_path: Path) -> None:
    """Not of whatever ran before: dropout in the resumed half is that of the whole run."""
    assert len({micro_seed(0, index, rank) for index in range(20) for rank in range(20)}) == 400
    nets = [PointNet(dropout=0.5) for _ in range(2)]
    for number, net in enumerate(nets):
        running = engine(tmp_path / str(number), net)
        torch.manual_seed(number)
        running.run()
    assert same(*nets)
    other = PointNet(dropout=0.5)
    engine(tmp_path / "other", other, plan=planned(seed=1)).run()
    assert not same(nets[0], other)


def test_soft_targets_of_a_mix(tmp_path: Path) -> None:
    seeds = []

    def mix(video: Tensor, labels: Mapping[str, Tensor], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        seeds.append(seed)
        return video, {name: nn.functional.one_hot(label, 2).float() for name, label in labels.items()}

    nets = [PointNet(), PointNet()]
    plain = engine(tmp_path / "plain", nets[0]).run()
    mixed = engine(tmp_path / "mixed", nets[1], mix=mix).run()
    assert len(set(seeds)) == 12
    assert [entry["loss"] for entry in mixed.history] == pytest.approx([entry["loss"] for entry in plain.history])
    assert plain.history[0].keys() - mixed.history[0].keys() == {"verb", "noun"}  # no accuracy on mixed clips


class Poisoned(PointSource):
    """From the 3rd step on, the 2nd micro-batch of each step has a point that is not a number."""

    value = math.nan

    def batches(self, epoch: int, start: int = 0):  # type: ignore[no-untyped-def]
        for number, batch in enumerate(super().batches(epoch, start), start=start):
            if number >= 4 and number % 2:
                batch.video = batch.video.index_fill(0, torch.tensor([0]), self.value)
            yield batch


def test_a_loss_that_is_no_number_stops_with_step_and_videos(tmp_path: Path) -> None:
    net, plan = PointNet(), planned(accumulate=2, micro_batch=4, checkpoint_every=1)
    source = Poisoned(4)
    bad = list(source.batches(0))[5].names
    good = list(source.batches(0))[4].names
    before: list[dict[str, Tensor]] = []
    running = engine(tmp_path, net, source, plan)
    with pytest.raises(DivergenceError, match="step 2: the loss is nan") as caught:
        running.run(lambda *_: before.append({k: v.clone() for k, v in net.state_dict().items()}))
    assert caught.value.step == 2
    assert caught.value.videos == bad
    assert all(name in str(caught.value) for name in bad)
    assert not any(name in str(caught.value) for name in good)
    assert "lower learning rate" in str(caught.value)
    assert all(torch.equal(tensor, before[-1][name]) for name, tensor in net.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_another_try_with_the_same_model_starts_without_gradients(tmp_path: Path) -> None:
    """A step that failed leaves the gradients of its first micro-batches behind."""
    net, plan = PointNet(), planned(accumulate=2, micro_batch=4)
    with pytest.raises(ValueError, match="ended after 1 of 2"):
        engine(tmp_path / "failed", net, Short(4), plan).run()
    assert net.body[0].weight.grad is not None
    fresh = PointNet()
    fresh.load_state_dict(net.state_dict())
    for name, model in (("again", net), ("fresh", fresh)):
        engine(tmp_path / name, model, PointSource(4), planned(accumulate=2, micro_batch=4, epochs=1)).run()
    assert same(net, fresh)


def test_a_gradient_that_is_infinite_stops_too(tmp_path: Path) -> None:
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * math.inf

    class Net(PointNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {name: Steep.apply(y) for name, y in super().forward(x).items()}

    net = Net()
    with pytest.raises(DivergenceError, match="the loss is finite, but the gradient's length is"):
        engine(tmp_path, net).run()
    assert same(net, Net())


def test_adamw_gets_the_plans_betas(tmp_path: Path) -> None:
    running = engine(tmp_path, PointNet(), plan=planned(betas=(0.8, 0.95)))
    assert {group["betas"] for group in running.optimizer.param_groups} == {(0.8, 0.95)}


def test_soft_targets_are_not_smoothed_again() -> None:
    logits, label = {"verb": torch.tensor([[2.0, -1.0, 0.5]])}, torch.tensor([1])
    soft = nn.functional.one_hot(label, 3) * 0.7 + 0.1  # smoothed by 0.3
    hard_loss, _ = classification(0.3)(logits, {"verb": label})
    soft_loss, _ = classification(0.3)(logits, {"verb": soft})
    torch.testing.assert_close(soft_loss, hard_loss)
    assert classification(0.0)(logits, {"verb": label})[0] != hard_loss


def test_processes_draw_different_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [PointNet(dropout=0.5) for _ in range(2)]
    for rank, net in enumerate(nets):
        running = engine(tmp_path / str(rank), net, plan=planned(epochs=1))
        monkeypatch.setattr(Accelerator, "process_index", property(lambda self, rank=rank: rank))
        running.run()
    assert not same(*nets)


def test_deepspeed_clips_only_where_the_recipe_says_so() -> None:
    assert deepspeed_settings(4, 2, None)["gradient_clipping"] == 0
    assert deepspeed_settings(4, 2, 0.3) == {
        "gradient_accumulation_steps": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.3,
        "zero_allow_untested_optimizer": True,
    }


class Short(PointSource):
    """Three micro-batches an epoch, whatever it promised."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield from list(super().batches(epoch, start))[:3]


def test_data_that_ends_early_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ended after 1 of 2 micro-batches of step 1"):
        engine(tmp_path, PointNet(), Short(4), planned(accumulate=2, micro_batch=4)).run()


def test_another_try_with_the_same_accelerator_starts_a_new_accumulation(tmp_path: Path) -> None:
    """A step that failed after one micro-batch of two leaves the accelerator in between."""
    plan = planned(accumulate=2, micro_batch=4, epochs=1)
    fresh, again = PointNet(), PointNet()
    engine(tmp_path / "fresh", fresh, PointSource(4), plan).run()
    failed = engine(tmp_path / "failed", PointNet(), Short(4), plan)
    with pytest.raises(ValueError, match="ended after 1 of 2"):
        failed.run()
    assert failed.accelerator.step == 3
    checkpoints = Checkpoints(tmp_path / "again", failed.accelerator, {"plan": "test"}, again)
    Engine(again, PointSource(4), plan, failed.accelerator, checkpoints).run()
    assert same(again, fresh)


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        engine(tmp_path, PointNet().requires_grad_(False))


class _Clips:
    """Random clips for a small CAST."""

    def __init__(self, model: CAST, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

    def __len__(self) -> int:
        return 20

    def batches(self, epoch: int, start: int = 0):  # type: ignore[no-untyped-def]
        for number in range(start, 20):
            video = small_video(self.model, batch=2, seed=number, dtype=self.dtype)
            labels = {name: torch.tensor([number % 3, 1]) for name in ("verb", "noun")}
            yield Batch(video, labels, ["a", "b"])


@pytest.mark.skipif(not HAS_KERNELS, reason="the native kernels are not built")
def test_fused_training_equals_unfused(tmp_path: Path) -> None:
    """After 20 steps, fused fp32 is as near to fp64 as eager fp32 is."""
    plan = Plan(epochs=1, steps_per_epoch=20, accumulate=1, micro_batch=2, rate=lambda step: 1e-3)
    ends = {}
    for name, dtype, fused in (("fp64", torch.float64, False), ("eager", torch.float32, False), ("fused", None, True)):
        model = small_model(heads={"verb": 3, "noun": 3}).to(dtype or torch.float32)
        model.fuse() if fused else model.unfuse()
        engine(tmp_path / name, model, _Clips(model, dtype or torch.float32), plan).run()
        ends[name] = {key: tensor.double() for key, tensor in model.state_dict().items()}
    start = small_model(heads={"verb": 3, "noun": 3}).state_dict()
    moved = sum(float((ends["fp64"][key] - tensor).square().sum()) for key, tensor in start.items()) ** 0.5
    errors = {
        name: sum(float((ends[name][key] - tensor).square().sum()) for key, tensor in ends["fp64"].items()) ** 0.5
        for name in ("eager", "fused")
    }
    assert moved > 0.1
    assert errors["fused"] < 4 * errors["eager"] + 1e-5 * moved, errors
    assert errors["fused"] < 0.05 * moved  # Adam divides by small moments, which magnifies rounding
