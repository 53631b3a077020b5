"""What is prepared ahead: one item, in order, with its error where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from training_cases import Batch, PointNet, PointSource, engine, planned

from cast.ground.transfer import Ahead, to_device

CPU = torch.device("cpu")


def test_one_item_is_ahead_at_most_and_order_stays() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            yield number

    ahead = Ahead(items(), lambda number: {"x": torch.tensor(number)}, CPU)
    assert made == []
    for number, tensors in ahead:
        assert int(tensors["x"]) == number
        assert made == list(range(number + 1))
        ahead.start()
        ahead.start()
        assert made == list(range(min(number + 2, 4)))
    assert made == [0, 1, 2, 3]


def test_an_error_met_ahead_is_raised_when_its_item_is_asked_for() -> None:
    def prepare(number: int) -> dict[str, Tensor]:
        return {"x": torch.tensor(1 // (1 - number))}

    ahead = Ahead(range(3), prepare, CPU)
    next(ahead)
    ahead.start()
    with pytest.raises(ZeroDivisionError):
        next(ahead)


def test_a_video_that_fails_ahead_costs_no_step_before_it(tmp_path: Path) -> None:
    class Failing(PointSource):
        def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
            for number, batch in enumerate(super().batches(epoch, start), start=start):
                if number == 3:
                    raise OSError("a damaged video")
                yield batch

    steps: list[int] = []
    running = engine(tmp_path, PointNet(), Failing(8), planned(checkpoint_every=1))
    with pytest.raises(OSError, match="a damaged video"):
        running.run(lambda progress, _: steps.append(progress.step))
    assert steps == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_copies_to_a_gpu_are_pinned_and_do_not_wait() -> None:
    asked: list[object] = []
    pinned = mock.Mock(to=lambda *where, **how: asked.append((where, how)))
    tensor = mock.Mock(device=CPU, pin_memory=lambda: pinned)
    to_device(tensor, "cuda:0")
    assert asked == [(("cuda:0",), {"non_blocking": True})]
    given = torch.ones(2)
    assert to_device(given, "cpu") is given
