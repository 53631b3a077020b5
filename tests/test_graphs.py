"""CUDA graphs give the bits of no graphs: training and prediction, with a stand-in for the GPU's recorder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from cast_models import SMALL, randomise, small_video
from fake_graphs import CUDAGraph, graphs_on_cpu
from torch import Tensor
from training_cases import Batch, PointNet, engine, planned

from cast import CAST, Predictor
from cast.ground.graphs import MOST, Graphs
from cast.training import Checkpoints, Engine, Step
from cast.training.distributed import Precision, make_accelerator

CPU = torch.device("cpu")


class Clips:
    """Random clips; the batches of an epoch have the sizes given."""

    def __init__(self, model: CAST, sizes: tuple[int, ...]) -> None:
        self.model, self.sizes = model, sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for number, size in enumerate(self.sizes[start:], start=start):
            video = small_video(self.model, batch=size, seed=100 * epoch + number)
            labels = {name: torch.arange(size) % 3 for name in ("verb", "noun")}
            yield Batch(video, labels, [f"{number}"] * size)


def trained(
    directory: Path, graphs: bool, sizes: tuple[int, ...], precision: Precision = "fp32", **options: object
) -> tuple[CAST, list[Step], dict[str, Tensor]]:
    """A model with drop path and dropout after two epochs, its steps, and its averages."""
    torch.manual_seed(0)
    small = SMALL | {"depth": 2, "drop_path": 0.3, "head_dropout": 0.3}
    model = randomise(CAST(heads={"verb": 3, "noun": 3}, **small))
    accumulate = int(options.get("accumulate", 1))  # type: ignore[call-overload]
    accelerator = make_accelerator(precision, accumulate=accumulate)
    plan = planned(steps_per_epoch=len(sizes) // accumulate, graphs=graphs, **options)
    checkpoints = Checkpoints(directory, accelerator, {"plan": "test"}, model)
    running = Engine(model, Clips(model, sizes), plan, accelerator, checkpoints)
    steps: list[Step] = []
    running.run(lambda progress, step: steps.append(step))
    return model, steps, {} if running.average is None else running.average.read()


def told(steps: list[Step]) -> list[tuple[object, ...]]:
    return [(step.figures, step.grad_norm, step.lr) for step in steps]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "options", "recordings"),
    [
        ((2, 2, 2, 2), {}, 1),
        ((2, 2, 2, 2), {"accumulate": 2, "clip_grad": 0.1, "ema": 0.9}, 1),
        ((2, 2, 2, 1), {"clip_grad": 0.1}, 2),  # the smaller one comes again in the second epoch
        ((1, 2, 3, 4), {}, 4),
    ],
)
def test_training_with_graphs_gives_the_bits_of_training_without(
    sizes: tuple[int, ...], options: dict[str, object], recordings: int, precision: Precision, tmp_path: Path
) -> None:
    model, steps, average = trained(tmp_path / "plain", False, sizes, precision, **options)
    with graphs_on_cpu() as made:
        same, same_steps, same_average = trained(tmp_path / "graphs", True, sizes, precision, **options)
    assert len(made) == recordings
    assert CUDAGraph.replays == 2 * len(sizes) - len(set(sizes))  # all but the first of each size
    assert told(same_steps) == told(steps)
    own = same.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert average.keys() == same_average.keys()
    assert all(torch.equal(tensor, same_average[name]) for name, tensor in average.items())


def test_a_replay_draws_new_numbers_from_the_seed() -> None:
    def noise(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"y": inputs["x"] + torch.empty_like(inputs["x"]).bernoulli_(0.5)}

    with graphs_on_cpu():
        graphs = Graphs(noise, CPU)
        x = torch.zeros(64)
        found = [graphs({"x": x}, seed)["y"] for seed in (1, 1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[2], found[3])


def test_what_a_call_returned_stays_when_the_next_replay_comes() -> None:
    with graphs_on_cpu():
        graphs = Graphs(lambda inputs: {"y": inputs["x"] * 2}, CPU)
        found = [graphs({"x": torch.full((3,), float(n))})["y"] for n in range(4)]
    assert [float(y[0]) for y in found] == [0, 2, 4, 6]


def test_changing_shapes_are_recorded_up_to_a_bound_only() -> None:
    with graphs_on_cpu() as made:
        graphs = Graphs(lambda inputs: {"y": inputs["x"] * 2}, CPU)
        for _ in range(3):
            for size in range(1, 3 * MOST):
                assert graphs({"x": torch.ones(size)})["y"].tolist() == [2.0] * size
        for size in range(100, 200):  # each comes once
            graphs({"x": torch.ones(size)})
    assert len(made) == MOST


def test_no_clip_at_all_is_as_good_as_without() -> None:
    with graphs_on_cpu():
        graphs = Graphs(lambda inputs: {"y": inputs["x"] * 2}, CPU)
        assert [graphs({"x": torch.ones(0, 3)})["y"].shape for _ in range(3)] == [(0, 3)] * 3


def test_what_no_graph_can_hold_says_so() -> None:
    def waits(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"y": inputs["x"] * float(inputs["x"].sum())}

    with graphs_on_cpu():
        graphs = Graphs(waits, CPU)
        graphs({"x": torch.ones(2)})
        with pytest.raises(RuntimeError, match="set graphs=false: operation not permitted"):
            graphs({"x": torch.ones(2)})


def test_weights_that_moved_are_recorded_anew() -> None:
    weights = [torch.ones(2)]
    with graphs_on_cpu() as made:
        graphs = Graphs(lambda inputs: {"y": inputs["x"] * weights[0]}, CPU, read=lambda: weights)
        for _ in range(2):
            graphs({"x": torch.ones(2)})
        weights[0].fill_(3)  # in place: the recording reads it
        assert graphs({"x": torch.ones(2)})["y"].tolist() == [3, 3]
        assert len(made) == 1
        weights[0] = torch.full((2,), 5.0)
        for _ in range(3):
            assert graphs({"x": torch.ones(2)})["y"].tolist() == [5, 5]
        assert len(graphs._recordings) == 1  # the void one holds no memory
    assert len(made) == 2


@pytest.mark.parametrize("clips", [1, 3, 5, 7])
def test_the_predictor_with_graphs_answers_as_without(clips: int) -> None:
    torch.manual_seed(0)
    model = randomise(CAST(heads={"verb": 3, "noun": 4}, **(SMALL | {"depth": 1}))).eval()
    size = model.config.image_size
    videos = torch.randint(0, 256, (3, clips, 3, model.config.num_frames, size, size), dtype=torch.uint8)
    wanted = [Predictor(model, batch=3)._logits(video) for video in videos]
    with graphs_on_cpu() as made:
        predictor = Predictor(model, batch=3, graphs=True)
        found = [predictor._logits(video) for video in videos]
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[head], logits) for head, logits in b.items())
    assert len(made) == {1: 1, 3: 1, 5: 2, 7: 2}[clips]


def test_without_a_gpu_graphs_are_an_error(tmp_path: Path) -> None:
    model = CAST(heads={"verb": 3}, **(SMALL | {"depth": 1}))
    with pytest.raises(ValueError, match="computes on cpu: set graphs=false, or run on a GPU"):
        Predictor(model, graphs=True)
    with pytest.raises(ValueError, match="computes on cpu: set graphs=false, or run on a GPU"):
        make_accelerator(graphs=True)


def test_graphs_keep_nothing_of_autocast_and_are_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with graphs_on_cpu():
        monkeypatch.setattr("cast.training.distributed.check_device", lambda device: None)
        accelerator = make_accelerator("bf16", graphs=True)
        with accelerator.autocast():
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_cache_enabled()
        monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MULTI_GPU)
        with pytest.raises(ValueError, match=r"works in one process by itself, and this is .*MULTI_GPU"):
            make_accelerator(graphs=True)


def test_a_parameter_without_a_gradient_stays_without(tmp_path: Path) -> None:
    """AdamW would let its weight decay where the gradient is zero instead of none."""

    class Idle(PointNet):
        def __init__(self) -> None:
            super().__init__()
            self.idle = torch.nn.Linear(3, 3)

    net = Idle()
    with graphs_on_cpu() as made:
        engine(tmp_path, net, plan=planned(graphs=True)).run()
    assert made
    assert torch.equal(net.idle.weight, Idle().idle.weight)
