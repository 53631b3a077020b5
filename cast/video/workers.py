"""Decoding processes that may die (the kernel's out-of-memory killer, a crash in a decoder), and messages about it."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_bool
from multiprocessing.context import BaseContext
from multiprocessing.sharedctypes import RawValue
from typing import Any

from torch.utils.data import DataLoader


class WorkerError(RuntimeError):
    """A decoding process died; the message says how, at which videos, and what to try."""


class WorkerDied(Exception):
    """A worker process of a DataLoader died; the message says how, for example "killed by SIGKILL"."""


def context() -> BaseContext:
    """Multiprocessing's default context for DataLoader, with a :class:`Flag` instead of each event."""
    usual = multiprocessing.get_context()
    return type("WorkerContext", (type(usual),), {"Event": lambda self: Flag()})()


class Flag:
    """An event that nobody waits for, of one byte and without a lock.

    DataLoader ends its processes by an event, and they read it after every item. Multiprocessing's own event takes a
    lock for each read. A process that is killed at that moment never releases the lock, and the training's next read
    waits forever.
    """

    def __init__(self) -> None:
        self._set = RawValue(c_bool, False)

    def is_set(self) -> bool:
        """Whether some process has called :meth:`set`."""
        return bool(self._set.value)

    def set(self) -> None:
        """Set it, for all processes."""
        self._set.value = True


def items(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the items of a DataLoader.

    Raises:
        WorkerDied: one of its processes died. It is raised at the next item of that process, at most about five seconds
    later.
    """
    before = set(multiprocessing.active_children())
    iterator: Any = None
    ours: set[Any] = set()
    try:
        with _deaths_told_by_polling():
            iterator = iter(loader)
        ours = set(multiprocessing.active_children()) - before
        while True:
            try:
                made = next(iterator)
            except StopIteration:
                return
            yield made
    except (RuntimeError, OSError, EOFError) as error:
        dead = [worker for worker in ours if worker.exitcode]
        if not dead and "exited unexpectedly" not in str(error) and "is killed by signal" not in str(error):
            raise
        raise WorkerDied(_how(dead) or str(error)) from error
    finally:
        del iterator  # ends the remaining workers


def _how(dead: Sequence[Any]) -> str:
    """Causes of the processes' deaths, such as "killed by SIGKILL"."""
    codes = sorted({worker.exitcode for worker in dead})
    return ", ".join(f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}" for code in codes)


@contextmanager
def _deaths_told_by_polling() -> Iterator[None]:
    """Keep DataLoader's signal handler from raising about dead workers at an arbitrary place of the main thread.

    The handler would interrupt a training step, which cannot replace the worker. Without it, the next request for a
    batch detects the death, at most five seconds later.
    """
    if threading.current_thread() is not threading.main_thread():  # PyTorch sets no handler here
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "__module__", "").startswith("torch."):  # set by another DataLoader, which polls as well
        before = signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
