"""Where a training on a GPU waits for it: once a step, after everything of the step is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from cast_models import SMALL
from fake_gpu import fake_gpu, gpu_autocast
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import planned

from cast import CAST
from cast.ground.transfer import to_device
from cast.model.config import CASTConfig
from cast.pretrain.command import criterion
from cast.pretrain.model import VideoMAE
from cast.pretrain.settings import DecoderSettings
from cast.training import Engine
from cast.training.distributed import make_accelerator
from cast.training.engine import Criterion
from cast.video.augment import AugmentSettings
from cast.video.mixing import Mixing

CUDA = torch.device("cuda")
WAIT, STEP, FORWARD, BACKWARD, COPY = "wait", "step", "forward", "backward", "copy"


class Events(TorchDispatchMode):
    """Notes what the host does with a GPU that is not there: waits, the optimizer's kernel, copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        on_gpu = [x for x in args if isinstance(x, Tensor) and x.device.type == "cuda"]
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"):
            self.seen += [WAIT] * bool(on_gpu)
            return 0  # what fake tensors hold
        if name in ("_to_copy", "copy_"):
            source = args[-1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
            if {source.device.type, target.type} == {"cpu", "cuda"}:
                waits = target.type == "cpu" or not (kwargs.get("non_blocking") or (args[2:3] or [False])[0])
                self.seen.append(WAIT if waits else COPY)
        if name == "_fused_adamw_":
            self.seen.append(STEP)
        return func(*args, **kwargs)


class Clips:
    """One batch for each step, in the memory of the host."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.shape = (2, 3, config.num_frames, config.image_size, config.image_size)

    def __len__(self) -> int:
        return 4

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        for _ in range(start, 4):
            with unset_fake_temporarily():
                video, labels = torch.zeros(self.shape), {name: torch.tensor([1, 0]) for name in ("verb", "noun")}
            moved = SimpleNamespace(names=["a", "b"], labels=labels)
            moved.to = lambda device, video=video, labels=labels: SimpleNamespace(
                video=to_device(video, device), labels={k: to_device(x, device) for k, x in labels.items()}
            )
            yield moved


@contextmanager
def streams() -> Iterator[list[str]]:
    """PyTorch's streams, which need a GPU, as a list of what was asked of them."""
    asked: list[str] = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            asked.append("made")

        def wait_stream(self, other: Any) -> None:
            asked.append("waits")

        def __enter__(self) -> None:
            asked.append("entered")

        def __exit__(self, *_: Any) -> None: ...

    main = Stream()
    asked.clear()
    with (
        mock.patch("torch.cuda.Stream", Stream),
        mock.patch("torch.cuda.stream", lambda stream: stream),
        mock.patch("torch.cuda.current_stream", return_value=main),
        mock.patch.object(Tensor, "record_stream", side_effect=lambda _: asked.append("recorded")),
        mock.patch.object(Tensor, "pin_memory", lambda self: self),
    ):
        yield asked


def train(
    make: Callable[[], nn.Module], accumulate: int, criterion: Criterion | None = None, **options: Any
) -> tuple[list[str], list[str]]:
    """Four micro-batches on fake tensors; what the host did, and what it asked of streams."""
    events = Events()
    accelerator = make_accelerator(accumulate=accumulate)
    checkpoints: Any = SimpleNamespace(attach=lambda *_: None, load=lambda: None, save=lambda _: None)
    checkpoints.update = checkpoints.save

    def backward() -> None:
        """PyTorch's engine asks CUDA itself; tests of kernels run their backward passes."""
        events.seen.append(BACKWARD)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    with (
        fake_gpu(),
        events,
        streams() as asked,
        mock.patch.object(type(accelerator), "device", property(lambda self: CUDA)),
        mock.patch.object(nn.Module, "to", lambda self, *_, **__: self),  # the model is there already
        mock.patch.object(type(accelerator), "backward", side_effect=lambda _: backward()),
    ):
        model = make()
        plan = planned(epochs=1, steps_per_epoch=4 // accumulate, accumulate=accumulate, micro_batch=2, **options)
        mixing = Mixing.of(AugmentSettings(mixup=0.8, smoothing=0.1))

        def mix(video: Tensor, labels: Any, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
            return mixing(video, labels, {"verb": 3, "noun": 4}, seed)

        engine = Engine(model, Clips(model), plan, accelerator, checkpoints, None if criterion else mix, criterion)
        model.register_forward_pre_hook(lambda *_: events.seen.append(FORWARD))
        events.seen.clear()
        engine.run()
    return events.seen, asked


def on_gpu(make: Callable[[], nn.Module]) -> nn.Module:
    with unset_fake_temporarily(), torch.device("meta"):
        model = make()
    return model.to_empty(device="cuda")


def small_cast() -> CAST:
    return CAST(heads={"verb": 3, "noun": 4}, **(SMALL | {"drop_path": 0.2, "depth": 2}))


def per_step(seen: list[str]) -> list[list[str]]:
    """The events of each step, those in a row that are equal as one; the first step's batch is copied before."""
    steps: list[list[str]] = [[]]
    for event in seen:
        if event == FORWARD and steps[-1][-1:] == [WAIT]:
            steps.append([])
        if steps[-1][-1:] != [event]:
            steps[-1].append(event)
    return steps


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"clip_grad": 1.0, "ema": 0.9}])
def test_the_host_waits_once_a_step_after_everything_is_launched(
    options: dict[str, float], autocast: torch.dtype | None
) -> None:
    with gpu_autocast(autocast):
        seen, asked = train(lambda: on_gpu(small_cast), 1, **options)
    middle = [FORWARD, BACKWARD, STEP, COPY, WAIT]
    assert per_step(seen) == [[COPY, *middle], middle, middle, [FORWARD, BACKWARD, STEP, WAIT]]
    # The copies have a stream of their own, which the computing one waits for, batch by batch.
    assert asked[0] == "made"
    assert asked.count("made") == 1
    assert asked.count("waits") == 4
    assert asked.count("recorded") == 4 * 3


def test_accumulation_waits_once_a_step_too() -> None:
    seen, _ = train(lambda: on_gpu(small_cast), 2)
    first, second = per_step(seen)
    assert first == [COPY, *[FORWARD, BACKWARD, COPY] * 1, FORWARD, BACKWARD, STEP, COPY, WAIT]
    assert second == [FORWARD, BACKWARD, COPY, FORWARD, BACKWARD, STEP, WAIT]


def test_pretraining_waits_once_a_step_too() -> None:
    """Its masks are drawn on the CPU, in forward."""
    config = CASTConfig(**(SMALL | {"depth": 1}))
    seen, _ = train(lambda: on_gpu(lambda: VideoMAE(config, DecoderSettings(depth=1), 0.5)), 1, criterion=criterion)
    for step in per_step(seen):
        launches = step[step.index(FORWARD) : step.index(STEP)]
        assert WAIT not in launches
        assert step[-1] == WAIT
    assert len(per_step(seen)) == 4
