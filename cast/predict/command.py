"""`cast predict`: a table for one video; a line of JSON for each of many, and for each moment of a stream."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cast.ground.files import printable
from cast.predict.guesses import Failure, PathLike, table
from cast.predict.predictor import EVERY, WINDOW, Predictor
from cast.video.decoders import decoder
from cast.video.folder import find_videos
from cast.video.frame_folders import is_folder_of_frames
from cast.video.sampling import Sampling
from cast.video.stream import TIMEOUT, frames, is_live


def main(
    video: PathLike,
    checkpoint: PathLike | Sequence[PathLike],
    top: int = 5,
    as_json: bool = False,
    sampling: Sampling | None = None,
    every: int = 0,
    window: int = WINDOW,
    batch: int = 6,
    trust_pickle: bool = False,
    timeout: float = TIMEOUT,
    graphs: bool = False,
) -> None:
    """Print the answers of the model at `checkpoint` for a video, a folder of videos or a stream.

    Args:
        video: a video file or a folder of its frames; a folder of videos; a camera, an address or "-" for
            standard input.
        checkpoint: see :class:`Predictor`.
        top: guesses per head.
        as_json: JSON instead of a table for one video; the others are always JSON lines.
        sampling: see :class:`Predictor`.
        every: frames between guesses about a stream; if not 0, a file is also read as a stream.
        window: last frames of a stream that a guess uses.
        batch: clips in a forward pass.
        trust_pickle: see :class:`Predictor`.
        timeout: seconds until a stream must be open, and until each picture must arrive; 0 waits forever.
        graphs: see :class:`Predictor`.

    Raises:
        VideoError: a video that can't be read.
        ValueError: no usable checkpoint, an option below 1, no video in the folder, or unreadable files in it; the
            others are predicted first.
    """
    what = os.fspath(video)
    live, folder = is_live(what), os.path.isdir(what) and not is_folder_of_frames(what)
    if not live and not folder:
        decoder("pyav").frame_count(what)  # a bad file fails before the model is loaded
    predictor = Predictor(checkpoint, top=top, sampling=sampling, batch=batch, trust_pickle=trust_pickle, graphs=graphs)
    if not predictor.sampling_known:
        places = [checkpoint] if isinstance(checkpoint, str | os.PathLike) else checkpoint
        print(
            f"cast predict: {', '.join(map(printable, places))} does not say how its training's frames were sampled; "
            "uniform sampling is taken, --sampling dense is for models of Kinetics",
            file=sys.stderr,
        )
    if every or live:
        _stream(predictor, what, every or EVERY, window, timeout)
    elif folder:
        _folder(predictor, what)
    else:
        _one(predictor, what, as_json)


def _one(predictor: Predictor, video: str, as_json: bool) -> None:
    prediction = predictor(video)
    if as_json:
        print(prediction.to_json())
        return
    console = Console()
    console.print(
        f"{printable(Path(video).name)}: {prediction.frames} frames, {prediction.views} views, "
        f"{predictor.protocol.sampling} sampling",
        highlight=False,
        markup=False,
    )
    console.print(table(prediction))


def _folder(predictor: Predictor, folder: str) -> None:
    found = find_videos(folder)
    if found.note:
        print(f"cast predict: {found.note}", file=sys.stderr)
    bad, total = 0, 0
    for answer in predictor.many(found.videos):
        print(answer.to_json(indent=None), flush=True)
        total += 1
        if isinstance(answer, Failure):
            bad += 1
            print(f"cast predict: {answer.error}", file=sys.stderr)
    if bad:
        raise ValueError(f"{bad} of {total} videos could not be read; the others are predicted")


def _stream(predictor: Predictor, source: str, every: int, window: int, timeout: float) -> None:
    pipe = sys.stdin.buffer
    # Unbuffered: Python can't exit while a thread waits inside a buffered reader.
    pictures = frames(getattr(pipe, "raw", pipe) if source == "-" else source, timeout=timeout)
    for moment in predictor.stream(pictures, every, window):
        print(moment.to_json(indent=None), flush=True)
