"""Probe many videos at once for faults, even if reading one of them kills the process.

This file does not import PyTorch, so that a new process starts quickly.
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
#: A process gets this many videos at a time.
_CHUNK = 16
#: A process holds at most this many bytes of decoded pictures: about 290 frames of 640 x 480.
_MEMORY = 2**28

#: A fault's name and the details.
Fault = tuple[str, str]


class Result(NamedTuple):
    """Result for a file: its fault or None, and width and height of its pictures if they could be decoded."""

    path: str
    fault: Fault | None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Probe:
    """Reads a video as training would: counts its frames and decodes those of validation.

    Args:
        frames: of a clip; a video with fewer has a fault.
        sampling: "uniform" or "dense".
        decoder: name of the decoder.
        every_frame: decode all frames, because training may take any.
    """

    frames: int
    sampling: Sampling
    decoder: Name
    every_frame: bool = False

    def __call__(self, path: str) -> Result:
        """The fault of a file, if any, and the size of its pictures."""
        file = Path(path)
        try:
            if not file.is_file() and not file.is_dir():
                return Result(path, ("missing", "not a regular file" if file.exists() else "no such file"))
            size = SMALLEST if file.is_dir() else file.stat().st_size
        except OSError as error:  # a name too long, a directory without permission
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
        """The results for some files."""
        return [self(path) for path in paths]


class _Crashed(Exception):
    def __init__(self, suspects: list[str]) -> None:
        super().__init__(suspects)
        self.suspects = suspects


def probe_all(probe: Probe, paths: Sequence[str], workers: int) -> Iterator[Result]:
    """Probe every file once, in any order.

    Args:
        probe: applied to each file.
        paths: the files, each once.
        workers: number of processes. If a file ends the process that reads it, that is the file's fault; the others are
            still probed.
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
    # Forking a process with threads (the progress bar's) can deadlock the child.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
