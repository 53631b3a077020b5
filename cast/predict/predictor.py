"""`Predictor`: a model with its class names for videos, folders and streams."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cast.baselines import Ensemble
from cast.ground.files import printable
from cast.ground.graphs import Graphs
from cast.ground.transfer import to_device
from cast.loading import Loaded, Model, as_loaded, load_models
from cast.metrics import average_views
from cast.model.labels import check_names, numbers
from cast.predict.guesses import Failure, Guess, Moment, PathLike, Prediction, guess, path_of
from cast.predict.window import Window
from cast.video.decoders import decoder
from cast.video.files import VideoError
from cast.video.folder import find_videos
from cast.video.sampling import Sampling
from cast.video.views import Protocol, normalise

#: Last frames of a stream that one guess uses, and frames from one guess to the next.
WINDOW, EVERY = 64, 16
#: Most videos that are decoded ahead of the model.
_AHEAD = 4
_VIDEO = "video"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """A video's clips for a model: :func:`decode` makes them and :meth:`Predictor.answer` takes them.

    Args:
        video: its path; bytes outside UTF-8 are escaped.
        frames: of the whole video.
        clips: of all views, uint8 [views, 3, T, S, S].
    """

    video: str
    frames: int
    clips: Tensor


def decode(video: PathLike, protocol: Protocol) -> Decoded:
    """Read a protocol's clips. This needs no model, so another thread or process may do it.

    Args:
        video: a video file, or a folder of frames.
        protocol: the predictor's; it can be pickled.

    Raises:
        VideoError: it can't be read as a video.
        TypeError: not a path, for example an array.
    """
    path = path_of(video)
    return Decoded(printable(path), decoder(protocol.decoder).frame_count(path), protocol.read(path))


class Predictor:
    """Names actions. Probabilities are means over all views of the published test protocol.

    Args:
        model: a CAST, a baseline or an Ensemble; or its place: a directory of `save_pretrained` or of a training, a
            name in `cast.list_models()`, a repository of the Hugging Face Hub, or a file of the authors; or several
            such places, whose models' probabilities are averaged.
        labels: class names by head; if None the model's own, else the classes' numbers.
        top: guesses per head, fewer if there are fewer classes.
        sampling: "uniform" (EPIC-Kitchens-100, Something-Something V2; 2 x 3 views) or "dense" (Kinetics-400; 5 x 3);
            if None that of the model's training, else uniform.
        batch: clips in a forward pass, of several videos together.
        device: the model's device; if None the GPU, if there is one.
        trust_pickle: whether a torch file may run code while it loads.
        graphs: whether forward passes are replayed as CUDA graphs, see :class:`cast.ground.graphs.Graphs`. A number of
            clips up to `batch` gets a graph when it occurs a second time. Afterwards the graph uses new weights if they
            were written in place or moved; it ignores new hooks, `fuse` and `unfuse`.

    Raises:
        ValueError: an invalid option, graphs without a GPU, labels that do not fit, or a model that cannot be read.
        FileNotFoundError: no such model.
    """

    top: int
    batch: int

    def __init__(
        self,
        model: Model | Ensemble | PathLike | Sequence[PathLike],
        labels: Mapping[str, Sequence[str]] | None = None,
        top: int = 5,
        sampling: Sampling | None = None,
        batch: int = 6,
        device: str | torch.device | None = None,
        trust_pickle: bool = False,
        graphs: bool = False,
    ) -> None:
        for name, value in (("top", top), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        found = _found(model, trust_pickle, sampling)
        self.model: Model | Ensemble = found.model.eval()
        if device is not None or not isinstance(model, nn.Module):
            self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = found.config
        names = labels or found.classes or numbers(config.classes)
        check_names("labels", names, config.classes)
        self.labels: dict[str, list[str]] = {head: list(names[head]) for head in config.classes}
        self.top, self.batch = top, batch
        self._run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = self._forward
        if graphs:
            device = next(self.model.parameters()).device
            self._run = Graphs(self._forward, device, read=self._weights)
        #: Whether the model or the caller gave the sampling of the training's frames.
        self.sampling_known: bool = bool(sampling or found.sampling)
        self.protocol: Protocol = Protocol(
            sampling or found.sampling or "uniform",
            frames=config.num_frames,
            size=config.image_size,
            short_side=found.short_side,
        )

    def __call__(self, video: PathLike) -> Prediction:
        """Name the action in one video file, or folder of frames.

        Raises:
            VideoError: it can't be read as a video.
            TypeError: not a path, for example an array.
        """
        return self.answer([decode(video, self.protocol)])[0]

    def folder(self, folder: PathLike) -> Iterator[Prediction | Failure]:
        """As :meth:`many`, for every video below a folder, in alphabetical order; a warning names omitted files.

        Raises:
            ValueError: there is no video.
        """
        found = find_videos(folder)
        if found.note:
            _log.warning(found.note)
        return self.many(found.videos)

    def many(self, videos: Iterable[PathLike]) -> Iterator[Prediction | Failure]:
        """Name the action in each of many videos, in their order; a file that can't be read becomes a Failure.

        Raises:
            TypeError: one path instead of many, or an item that is not a path.
        """
        if isinstance(videos, str | os.PathLike):
            raise TypeError(
                f"videos is the one path {os.fspath(videos)!r}; give a list of paths, or call the predictor"
            )
        ready: list[Decoded] = []
        for name, decoded in self._ahead(videos):
            try:
                ready.append(decoded.result())
                failed = None
            except VideoError as error:
                failed = Failure(name, str(error))
            if failed or len(ready) * self.protocol.clips >= self.batch:
                yield from self.answer(ready)
                ready = []
            if failed:
                yield failed
        yield from self.answer(ready)

    def stream(self, frames: Iterable[np.ndarray], every: int = EVERY, window: int = WINDOW) -> Iterator[Moment]:
        """Name the action in a stream, again and again.

        A guess uses the last `window` frames: the model's frames are sampled from them as from a video, in one view,
        cropped at the centre. The first guess comes when the window is full, the next ones every `every` frames, the
        last one at the stream's end.

        Args:
            frames: pictures, uint8 RGB [H, W, 3], for example `cast.video.stream.frames("/dev/video0")`.
            every: frames from one guess to the next.
            window: last frames that one guess uses.

        Raises:
            ValueError, TypeError: a frame of another shape or type, options below 1, or a stream without frames.
        """
        held = Window(self.protocol, every, window)
        for clip, first, last in held.clips(frames):
            yield Moment(first, last, self._guesses(self._logits(clip[None])))

    def _ahead(self, videos: Iterable[PathLike]) -> Iterator[tuple[str, Future[Decoded]]]:
        """Names and clips, decoded in advance. FFmpeg works outside the interpreter's lock."""
        waiting: deque[tuple[str, Future[Decoded]]] = deque()
        with ThreadPoolExecutor(min(_AHEAD, os.cpu_count() or 1)) as pool:
            for video in videos:
                waiting.append((printable(path_of(video)), pool.submit(decode, video, self.protocol)))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()

    def answer(self, videos: Sequence[Decoded]) -> list[Prediction]:
        """Name the action in each of some decoded videos; their clips go through the model `batch` at a time."""
        if not videos:
            return []
        logits = self._logits(torch.cat([video.clips for video in videos]))
        counts = [len(video.clips) for video in videos]
        parts = {head: values.split(counts) for head, values in logits.items()}
        return [
            Prediction(video.video, video.frames, count, self._guesses({head: part[n] for head, part in parts.items()}))
            for n, (video, count) in enumerate(zip(videos, counts, strict=True))
        ]

    def _guesses(self, logits: Mapping[str, Tensor]) -> dict[str, list[Guess]]:
        """Guesses from the logits [views, classes] of one video."""
        return guess({head: average_views(values) for head, values in logits.items()}, self.labels, self.top)

    @torch.inference_mode()
    def _logits(self, clips: Tensor) -> dict[str, Tensor]:
        """uint8 [clips, 3, T, S, S] -> logits by head, [clips, classes]."""
        like = next(self.model.parameters())
        parts = [
            self._run({_VIDEO: normalise(to_device(part, like.device)).to(like.dtype)})
            for part in clips.split(self.batch)
        ]
        return {head: torch.cat([part[head] for part in parts]) for head in parts[0]}

    def _forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.model(inputs[_VIDEO])

    def _weights(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()


def _found(
    model: Model | Ensemble | PathLike | Sequence[PathLike], trust_pickle: bool, sampling: Sampling | None
) -> Loaded:
    if isinstance(model, nn.Module):
        return as_loaded(model)
    return load_models([model] if isinstance(model, str | os.PathLike) else model, trust_pickle, sampling)


def predict(
    model: Model | Ensemble,
    video: PathLike,
    labels: Mapping[str, Sequence[str]],
    top: int = 5,
    sampling: Sampling | None = None,
) -> Prediction:
    """Name the action in one video with a model in memory; see :class:`Predictor` for arguments and errors."""
    return Predictor(model, labels, top, sampling, batch=1)(video)
