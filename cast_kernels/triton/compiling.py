"""The first call on a GPU: its kernels compile side by side, and a line says why the call takes so long."""

from __future__ import annotations

import ast
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import triton

#: Seconds of compiling after which a line says so: kernels that were found in Triton's cache take less.
PATIENCE = 2.0
_LOG = logging.getLogger("cast_kernels")
#: Held by the thread whose kernels compile side by side: `ast.parse` is one for all threads.
_COMPILING = threading.Lock()


def side_by_side(compilations: Sequence[Callable[[], object]], here: bool = True) -> None:
    """Run calls of Triton's `warmup` such that what they compile is compiled by as many threads as there are cores.

    Triton gives the interpreter's lock away in its passes and in ptxas. A fault in a kernel is raised here.

    Args:
        compilations: those of kernels that are known cost the look into Triton's dictionary.
        here: whether this machine's GPU will run them, and a line says so where it takes long.
    """
    timer = threading.Timer(PATIENCE, _say)
    timer.daemon = True
    if here:
        timer.start()
    try:
        with _together(len(compilations)):
            for compilation in compilations:
                compilation()
    finally:
        timer.cancel()


@contextmanager
def _together(count: int) -> Iterator[None]:
    """Within it Triton compiles in threads; all are done at its end."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode, active_mode
    except ImportError:  # a release without it compiles one kernel after the other
        yield
        return
    if count < 2 or active_mode.get() is not None:
        yield
        return
    threads = min(count, os.cpu_count() or 1)
    with _COMPILING, _one_parser_at_a_time(), ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool):
        yield


@contextmanager
def _one_parser_at_a_time() -> Iterator[None]:
    """Within it, threads that parse Python wait for each other.

    CPython 3.11 counts how deep a syntax tree is in one number for all threads. Two threads that parse kernels raise
    "SystemError: AST constructor recursion depth mismatch", as Python 3.11.7 did in eight tests of one run. Parsing
    holds the interpreter's lock, so waiting costs nothing.
    """
    parse, lock = ast.parse, threading.Lock()

    def alone(*arguments: Any, **options: Any) -> Any:
        with lock:
            return parse(*arguments, **options)

    ast.parse = alone
    try:
        yield
    finally:
        ast.parse = parse


@cache
def _say() -> None:
    """Once a process, to the logger `cast_kernels`, which prints warnings to stderr unless told otherwise."""
    _LOG.warning(
        "cast_kernels: compiling kernels for this GPU; they are kept in %s, and later processes find them there. "
        "`cast-kernels compile --cache` compiles them ahead.",
        triton.knobs.cache.dir,
    )
