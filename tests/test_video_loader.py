"""Batches that depend on (seed, epoch, position) alone: not on workers, their deaths, resumption, or the processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from log_messages import log_messages
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from video_files import numbers, write_video

from cast.video import loader as loader_module
from cast.video.annotations import Sample
from cast.video.augment import AugmentSettings
from cast.video.datasets import DataSettings
from cast.video.decoders import PyAV
from cast.video.files import VideoError
from cast.video.loader import Batch, ClipLoader
from cast.video.sampling import view_indices
from cast.video.workers import WorkerDied, WorkerError

AUGMENT = AugmentSettings(flip=0.5, randaugment="rand-m7-n4-mstd0.5-inc1", erasing=0.5, color_jitter=0.4)
SETTINGS = DataSettings("unused", size=24, workers=0, augment=AUGMENT)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("videos")
    sizes = [(48, 64), (64, 48), (40, 40)]
    made = [write_video(folder / f"{i}.mp4", count=20 + i, size=sizes[i % 3]) for i in range(11)]
    return [Sample(path, {"verb": index, "noun": 20 - index}) for index, path in enumerate(made)]


@pytest.fixture
def quick_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have DataLoader look for dead workers more often than every five seconds, to save the tests' time."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))


@pytest.fixture
def messages() -> Iterator[list[str]]:
    with log_messages("cast.video.loader") as seen:
        yield seen


def make(samples: list[Sample], batch_size: int = 3, train: bool = True, **changes: Any) -> ClipLoader:
    names = {field.name for field in dataclasses.fields(DataSettings)}
    settings = dataclasses.replace(SETTINGS, **{key: changes.pop(key) for key in list(changes) if key in names})
    return ClipLoader(samples, settings, batch_size, train, **changes)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.names == b.names
        assert torch.equal(a.video, b.video)
        assert all(torch.equal(a.labels[head], b.labels[head]) for head in ("verb", "noun"))


def test_a_training_epoch_shows_whole_batches_of_different_videos(samples: list[Sample]) -> None:
    loader = make(samples)
    assert len(loader) == 3  # 11 videos, the last two left out
    epochs = [list(loader.batches(epoch)) for epoch in (0, 1)]
    for batches in epochs:
        names = [name for batch in batches for name in batch.names]
        assert len(set(names)) == len(names) == 9
        for batch in batches:
            assert batch.video.shape == (3, 3, 16, 24, 24)
            assert batch.video.dtype == torch.float32
            verbs = [int(Path(name).stem) for name in batch.names]
            assert batch.labels["verb"].tolist() == verbs
            assert batch.labels["noun"].tolist() == [20 - verb for verb in verbs]
    orders = [[name for batch in batches for name in batch.names] for batches in epochs]
    assert orders[0] != orders[1]


def test_validation_shows_every_video_once_in_order(samples: list[Sample]) -> None:
    loader = make(samples, 4, train=False, size=40)
    batches = list(loader.batches(7))
    assert len(loader) == 3
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert [name for batch in batches for name in batch.names] == [str(sample.path) for sample in samples]
    last = batches[0].video[2]  # of 40 x 40 pixels, so nothing was cropped or resized
    seen = numbers(last.permute(1, 2, 3, 0).numpy() * 60 + 128)
    assert seen == view_indices(22, 0, 1).tolist()
    assert_same(batches, list(loader.batches(0)))


def test_neither_workers_nor_resumption_change_a_bit(samples: list[Sample]) -> None:
    expected = list(make(samples, seed=4).batches(2))
    assert_same(expected, list(make(samples, seed=4, workers=1).batches(2)))
    assert_same(expected[1:], list(make(samples, seed=4, workers=2).batches(2, start=1)))
    assert_same(expected[2:], list(make(samples, seed=4).batches(2, start=2)))
    assert list(make(samples).batches(2, start=3)) == []
    other = list(make(samples, seed=5).batches(2))
    assert not torch.equal(other[0].video, expected[0].video)


def test_every_clip_of_every_epoch_is_drawn_anew(samples: list[Sample]) -> None:
    """The same video in two places of the list, and in two epochs: other frames or another crop each time."""
    loader = make([samples[0]] * 4, 4, augment=AugmentSettings())
    clips = [clip for epoch in (0, 1) for clip in next(loader.batches(epoch)).video]
    assert not any(torch.equal(a, b) for i, a in enumerate(clips) for b in clips[:i])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one(samples: list[Sample], world: int) -> None:
    one = list(make(samples, 2 * world).batches(0))
    ranks = [list(make(samples, 2, rank=rank, world=world).batches(0)) for rank in range(world)]
    for step, whole in enumerate(one):
        parts = [batches[step] for batches in ranks]
        assert [len(batch) for batch in parts] == [2] * world
        names = [parts[place % world].names[place // world] for place in range(2 * world)]
        videos = torch.stack([parts[place % world].video[place // world] for place in range(2 * world)])
        assert names == whole.names
        assert torch.equal(videos, whole.video)


def test_processes_validate_every_video_once(samples: list[Sample]) -> None:
    loaders = [make(samples, 2, train=False, rank=rank, world=5) for rank in range(5)]
    batches = [list(loader.batches(0)) for loader in loaders]
    assert [len(part) for part in batches] == [len(loader) for loader in loaders] == [2, 1, 1, 1, 1]
    names = [name for part in batches for batch in part for name in batch.names]
    assert sorted(names) == sorted(str(sample.path) for sample in samples)


def test_augmenting_on_the_device_gives_the_same_bits(samples: list[Sample]) -> None:
    expected = list(make(samples).batches(0))
    raw = list(make(samples, augment=dataclasses.replace(AUGMENT, on="device"), workers=1).batches(0))
    assert {batch.video.dtype for batch in raw} == {torch.uint8}
    assert_same(expected, [batch.to("cpu") for batch in raw])
    assert all(batch.to("cpu").plans is None for batch in raw)


def test_repeats_stand_side_by_side_and_share_their_frames(samples: list[Sample]) -> None:
    bare = AugmentSettings(scale=(0.5, 1.0), repeats=2)
    loader = make(samples, 4, augment=bare)
    assert len(loader) == 5
    for batch in loader.batches(0):
        assert batch.names[0] == batch.names[1] != batch.names[2] == batch.names[3]
        assert batch.labels["verb"][0] == batch.labels["verb"][1]
        assert not torch.equal(batch.video[0], batch.video[1])
    whole = AugmentSettings(scale=(1.0, 1.0), ratio=(1.0, 1.0), repeats=2)
    square = [samples[index] for index in (2, 5, 8)]
    for batch in make(square, 2, augment=whole).batches(0):
        assert torch.equal(batch.video[0], batch.video[1])  # the whole picture: only the frames could differ
    with pytest.raises(ValueError, match="a multiple of repeats = 2"):
        make(samples, 3, augment=bare)


def test_a_killed_worker_is_replaced_and_no_bit_changes(
    samples: list[Sample], quick_polling: None, messages: list[str]
) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    expected = list(make(samples, 1).batches(0))
    got, before = [], set(multiprocessing.active_children())
    for number, batch in enumerate(make(samples, 1, workers=2).batches(0)):
        got.append(batch)
        if number == 3:
            for worker in set(multiprocessing.active_children()) - before:
                assert worker.pid
                os.kill(worker.pid, signal.SIGKILL)
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline:  # as a training step would: nothing may interrupt it
                np.random.default_rng(0).random(1000)
    assert_same(expected, got)
    assert messages == ["a data worker died (killed by SIGKILL); others take over, no clip is lost"]
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert set(multiprocessing.active_children()) <= before


class Deadly(PyAV):
    """Ends the process that reads a certain file."""

    def read(self, path: Any, indices: Any, threads: int = 0) -> np.ndarray:
        if Path(path).stem == "5":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(path, indices, threads)


def test_a_batch_that_kills_every_worker_is_named(
    samples: list[Sample], quick_polling: None, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    monkeypatch.setattr("cast.video.views.decoder", lambda *_: Deadly())
    batches, got = make(samples, 2, train=False, workers=1).batches(0), []
    with pytest.raises(WorkerError, match=r"3 workers died in a row at the batch of .*4\.mp4, .*5\.mp4 \(killed by"):
        got += batches  # which keeps those before the error
    assert_same(got, list(make(samples[:4], 2, train=False).batches(0)))
    # Two at that batch before the error; more where a worker died before its earlier batches had arrived.
    assert len(messages) >= 2
    assert set(messages) == {"a data worker died (killed by SIGKILL); others take over, no clip is lost"}


def test_the_batch_that_kills_is_told_from_those_that_are_lost_with_it(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    """A worker that dies of its third batch before the first two have arrived, each time."""

    def lost(loader: Any) -> Iterator[Any]:
        if any(5 in key.videos for key in loader.sampler):
            raise WorkerDied("killed by SIGKILL")
        yield from (loader.dataset[key] for key in loader.sampler)

    monkeypatch.setattr(loader_module, "items", lost)
    got: list[Batch] = []
    with pytest.raises(WorkerError, match=r"3 workers died in a row at the batch of .*4\.mp4, .*5\.mp4 \(killed by"):
        got += make(samples, 2, train=False, workers=1).batches(0)
    assert [len(batch) for batch in got] == [2, 2]
    assert len(messages) == 4


def test_deaths_count_in_a_row_only(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    def one_and_no_more(loader: Any) -> Iterator[Any]:
        keys = loader.sampler
        yield loader.dataset[keys[0]]
        if keys[1:]:
            raise WorkerDied("killed by SIGKILL")

    monkeypatch.setattr(loader_module, "items", one_and_no_more)
    assert_same(list(make(samples, 1).batches(0)), list(make(samples, 1, workers=1).batches(0)))
    assert len(messages) == 5  # of eleven batches; three deaths in a row would be an error


def test_a_validation_has_its_own_videos_whatever_a_training_began_with(samples: list[Sample]) -> None:
    loader = make(samples[:4], 3, train=False, planned=9)
    assert [len(batch) for batch in loader.batches(0)] == [3, 1]


def test_an_unreadable_video_is_named_and_nothing_takes_its_place(samples: list[Sample], tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(samples[0].path.read_bytes()[:900])
    for workers in (0, 1):
        loader = make([*samples[:2], Sample(broken, {"verb": 0, "noun": 0})], 3, workers=workers)
        with pytest.raises(ValueError, match=r"broken\.mp4: is truncated"):
            list(loader.batches(0))


def test_memory_stays_bounded_over_a_thousand_batches(samples: list[Sample]) -> None:
    """Resident memory of this process and its worker grows by less than 16 MiB after the first 200 batches."""
    tiny = [samples[index] for index in (2, 5, 8)]
    loader = make(tiny * 400, 1, workers=1, size=16, frames=4, augment=AugmentSettings())
    process, seen = psutil.Process(), {}
    for number, _ in enumerate(loader.batches(0)):
        if number in (200, 1000):
            family = [process, *process.children()]
            seen[number] = sum(member.memory_info().rss for member in family)
        if number == 1000:
            break
    assert (seen[1000] - seen[200]) / 2**20 < 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 12}, r"11 videos make no batch of 12; lower batch_size \(in a recipe optim\.total_batch"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world": 2}, "rank is 2 of 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(samples: list[Sample], arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(samples, **arguments)


def test_missing_files_are_counted_at_once(samples: list[Sample], tmp_path: Path) -> None:
    gone = Sample(tmp_path / "gone.mp4", {"verb": 0, "noun": 0})
    with pytest.raises(ValueError, match=r"1 of 12 videos are missing: .*gone\.mp4; cast data check"):
        make([*samples, gone])
    with pytest.raises(ValueError, match="start is 4"):
        next(make(samples).batches(0, start=4))


def test_an_epoch_that_lost_videos_keeps_its_length(samples: list[Sample]) -> None:
    """Nine videos were planned, three batches of three; seven are left, and two of them come a second time."""
    loader = make(samples[:7], 3, planned=9)
    assert len(loader) == 3
    order = [name for batch in loader.batches(1) for name in batch.names]
    assert len(order) == 9
    assert (len(set(order[:7])), order[7:]) == (7, order[:2])
    assert_same(list(loader.batches(1))[1:], list(loader.batches(1, start=1)))
    shares = [make(samples[:7], 1, rank=rank, world=3, planned=9) for rank in range(3)]
    dealt = zip(*(share.batches(1) for share in shares), strict=True)
    assert [batch.names[0] for step in dealt for batch in step] == order


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_video_is_one_line_that_begins_with_its_name(tmp_path: Path, workers: int) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video\n" * 300)
    settings = DataSettings(str(tmp_path), workers=workers, size=16)
    loader = ClipLoader([Sample(bad, {"action": 0})], settings, 1, train=True)
    with pytest.raises(VideoError) as caught:
        list(loader.batches(0))
    assert str(caught.value).startswith(f"{bad}: ")
    assert f"add the line bad.mp4,by hand to {tmp_path / 'skip.csv'}, below" in str(caught.value)
    assert "\n" not in str(caught.value)
