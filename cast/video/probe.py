"""Probing many videos at once: what is wrong with each, even if looking at one kills the process.

This file does not import PyTorch, so that a fresh process is there in a moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from cast.ground.files import printable
from cast.video.decoders import Name, decoder
from cast.video.files import VideoError
from cast.video.sampling import Sampling, view_indices

#: The published code skips files of fewer bytes.
SMALLEST = 1024
#: Videos that a process gets at a time.
_CHUNK = 16
#: Bytes of pictures that a process decodes at a time: 300 frames of 640 x 480.
_MEMORY = 2**28

#: A fault's name and the details.
Fault = tuple[str, str]


class Result(NamedTuple):
    """What a look at a file found: a fault if it has one, and width and height of its pictures if they can be seen."""

    path: str
    fault: Fault | None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Probe:
    """Looks at a video as training would: counts its frames and decodes those that validation takes.

    Args:
        frames: of a clip; fewer are a fault.
        sampling: "uniform" or "dense".
        decoder: name of the decoder.
        every_frame: decode all frames, as training may take any.
    """

    frames: int
    sampling: Sampling
    decoder: Name
    every_frame: bool = False

    def __call__(self, path: str) -> Result:
        """What is wrong with a file, if anything, and how large its pictures are."""
        file = Path(path)
        try:
            if not file.is_file() and not file.is_dir():
                return Result(path, ("missing", "not a regular file" if file.exists() else "no such file"))
            size = SMALLEST if file.is_dir() else file.stat().st_size
        except OSError as error:  # a name that is too long, a directory that may not be entered
            return Result(path, ("missing", error.strerror or str(error)))
        if size < SMALLEST:
            return Result(path, ("empty", f"{size} bytes"))
        reader = decoder(self.decoder)
        try:
            length = reader.frame_count(path, threads=1)
            pictures = reader.read(path, view_indices(length, 0, 1, self.sampling, self.frames), threads=1)
            if self.every_frame:
                at_once = max(1, _MEMORY // pictures[0].nbytes)
                for first in range(0, length, at_once):
                    reader.read(path, range(first, min(first + at_once, length)), threads=1)
        except VideoError as error:
            return Result(path, ("undecodable", str(error).removeprefix(f"{printable(path)}: ")))
        short = ("short", f"{length} frames, a clip has {self.frames}") if length < self.frames else None
        return Result(path, short, (pictures.shape[2], pictures.shape[1]))

    def chunk(self, paths: Sequence[str]) -> list[Result]:
        """What is wrong with each of some files."""
        return [self(path) for path in paths]


class _Crashed(Exception):
    def __init__(self, suspects: list[str]) -> None:
        super().__init__(suspects)
        self.suspects = suspects


def probe_all(probe: Probe, paths: Sequence[str], workers: int) -> Iterator[Result]:
    """Probe every file once, in any order.

    Args:
        probe: what to do with each.
        paths: the files, each once.
        workers: processes. A file that ends the process which reads it is a fault of that file; the others are probed
            all the same.
    """
    left = list(paths)
    while left:
        done: set[str] = set()
        try:
            for result in _in_parallel(probe, left, workers):
                done.add(result.path)
                yield result
        except _Crashed as crash:
            for result in _one_by_one(probe, crash.suspects):
                done.add(result.path)
                yield result
        left = [path for path in left if path not in done]


def _in_parallel(probe: Probe, paths: Sequence[str], workers: int) -> Iterator[Result]:
    chunks = iter([paths[first : first + _CHUNK] for first in range(0, len(paths), _CHUNK)])
    with _pool(workers) as pool:
        waiting = {pool.submit(probe.chunk, chunk): chunk for chunk in islice(chunks, 2 * workers)}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                if isinstance(future.exception(), BrokenProcessPool):
                    raise _Crashed([path for chunk in waiting.values() for path in chunk])
                del waiting[future]
                yield from future.result()
                waiting |= {pool.submit(probe.chunk, chunk): chunk for chunk in islice(chunks, 1)}


def _one_by_one(probe: Probe, paths: Sequence[str]) -> Iterator[Result]:
    left = list(paths)
    while left:
        with _pool(1) as pool:
            try:
                while left:
                    yield pool.submit(probe.chunk, left[:1]).result()[0]
                    left.pop(0)
            except BrokenProcessPool:
                crash = "undecodable", "reading it ends the process that does (a crash in the decoder)"
                yield Result(left.pop(0), crash)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Forking a process that runs threads (the progress bar's) can deadlock the child.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
