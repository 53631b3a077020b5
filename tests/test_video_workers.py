"""Processes of a DataLoader that are killed at the worst moment."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader, Dataset

from cast.video.workers import Flag, WorkerDied, context, items


def _event_of_the_worker() -> object:
    """What torch gave the worker to look at: a local of a frame above."""
    frame = sys._getframe()
    while "done_event" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_locals["done_event"]


class Killed(Dataset[int]):
    """Items 0 and 1, then a process that is killed while it looks at its event."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        if index == 2:
            event = _event_of_the_worker()
            if hasattr(event, "_cond"):
                event._cond.acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.fixture
def a_minute() -> Iterator[None]:
    """An error after a minute, in place of waiting for ever."""

    def late(*_: object) -> None:
        raise TimeoutError("nobody told that the process is dead")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("a_minute")
def test_a_process_killed_while_it_looks_at_its_event_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    loader = DataLoader(Killed(), batch_size=None, num_workers=2, multiprocessing_context=context())
    made: list[int] = []
    with pytest.raises(WorkerDied, match="killed by SIGKILL"):
        made.extend(items(loader))
    assert made in ([], [0], [0, 1]), "the death is told at the next item, whoever owes it"


def test_a_flag_is_seen_by_other_processes() -> None:
    flag, usual = Flag(), context()
    assert not flag.is_set()
    process = usual.Process(target=flag.set)
    process.start()
    process.join()
    assert flag.is_set()
