"""Decoding processes that may die (the kernel's out-of-memory killer, a crash in a decoder), and how that is told."""

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
    """A decoding process died; the message says how, over which videos, and what to try."""


class WorkerDied(Exception):
    """A process of a DataLoader died; the message says how, such as "killed by SIGKILL"."""


def context() -> BaseContext:
    """Where a DataLoader's processes come from: the default way, with a :class:`Flag` in place of each event."""
    usual = multiprocessing.get_context()
    return type("WorkerContext", (type(usual),), {"Event": lambda self: Flag()})()


class Flag:
    """An event that nobody waits for, of one byte and without a lock.

    DataLoader tells its processes by an event to end, and they look at it after every item. Multiprocessing's own takes
    a lock for a look: a process that is killed in that moment never gives it back, and the next look of the training
    itself waits for ever.
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
    """What a DataLoader makes.

    Raises:
        WorkerDied: one of its processes did, at the next item that it owed, at most about five seconds late.
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
        del iterator  # ends the workers that are left


def _how(dead: Sequence[Any]) -> str:
    """How processes ended, such as "killed by SIGKILL"."""
    codes = sorted({worker.exitcode for worker in dead})
    return ", ".join(f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}" for code in codes)


@contextmanager
def _deaths_told_by_polling() -> Iterator[None]:
    """Keep DataLoader from raising about dead workers wherever the main thread happens to be.

    Its signal handler would interrupt a training step, where nobody can make up for the worker; without the handler
    the next request for a batch finds out, at most five seconds later.
    """
    if threading.current_thread() is not threading.main_thread():  # PyTorch sets no handler here
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "__module__", "").startswith("torch."):  # of another DataLoader, which polls as well
        before = signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
