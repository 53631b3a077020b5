"""Processes of their own for tests, which start in milliseconds: a server imports PyTorch once and they fork from it.

They are real processes, killed and joined like any other; what they inherit has used no thread and no autograd yet.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["cast.training.command", "cast.evaluation.run"])


@contextmanager
def started(
    target: Callable[..., Any], *arguments: Any, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[BaseProcess]:
    """A process that calls `target`; what it prints goes to `log`. It does not outlive the block."""
    call = (target, arguments, log, torch.get_num_threads(), dict(environment or {}))
    process = _CONTEXT.Process(target=_run, args=call)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def free_port() -> int:
    """A port where nobody listens, not among those that the system gives to outgoing connections (Linux: from 32768).

    So no connection of another program takes it between this call and the use.
    """
    while True:
        port = secrets.randbelow(12768) + 20000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def together(target: Callable[..., Any], *arguments: Any, processes: int, logs: Path, timeout: float = 300) -> None:
    """`target` in so many processes, which find each other as under torchrun; each must end well."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    ranks = []
    try:
        for rank in range(processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            block = started(target, *arguments, log=logs / f"rank-{rank}.txt", environment=environment | place)
            ranks.append((block, block.__enter__()))
        for rank, (_, process) in enumerate(ranks):
            process.join(timeout)
            assert process.exitcode == 0, (logs / f"rank-{rank}.txt").read_text()
    finally:
        for block, _ in ranks:
            block.__exit__(None, None, None)


def _run(
    target: Callable[..., Any], arguments: tuple[Any, ...], log: Path, threads: int, environment: Mapping[str, str]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(threads)
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = target(*arguments)
        sys.stdout.flush()
    raise SystemExit(code)
