"""Batches for training, decoded and augmented by worker processes. Workers do not influence the bits.

A batch depends only on (seed, epoch, position, rank, world). So a run may have any number of workers and may resume at
any position. If a worker dies (the kernel's out-of-memory killer, a crash in a decoder), another one makes its batch
again. Only the time differs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cast.ground.transfer import to_device
from cast.video.annotations import Sample
from cast.video.augment import AugmentPlan, AugmentSettings, apply, draw
from cast.video.decoders import decoder
from cast.video.files import VideoError
from cast.video.sampling import Choose, train_indices
from cast.video.skips import how_to_skip
from cast.video.views import Protocol, normalise
from cast.video.workers import WorkerDied, WorkerError, context, items

if TYPE_CHECKING:
    from cast.video.datasets import DataSettings

#: Batches that each worker prepares ahead; together with the batch's size this bounds the memory.
AHEAD = 2
#: After so many deaths of workers without a finished batch, the batch itself is the likely cause.
MOST_DEATHS = 3
# First words of the seeds, so that order and clips never share a random stream.
_ORDER, _CLIP = 1, 2

_log = logging.getLogger(__name__)


@dataclass
class Batch:
    """One micro-batch.

    Args:
        video: float32 `[B, 3, T, S, S]`, normalised. With `plans`: uint8 `[B, T, 3, H, W]` as stored, each clip in the
            top left corner of the batch's largest picture.
        labels: head -> int64 `[B]`.
        names: the video files, for messages.
        plans: the augmentation that :meth:`to` must do, and the height and width of each stored picture.
        size: side of the clips that the plans make.
    """

    video: Tensor
    labels: dict[str, Tensor]
    names: list[str]
    plans: list[tuple[AugmentPlan, int, int]] | None = None
    size: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device, float32 `[B, 3, T, S, S]`; augmented there if it has `plans`."""
        video = to_device(self.video, device)
        labels = {head: to_device(label, device) for head, label in self.labels.items()}
        if self.plans is not None:
            clips = zip(video, self.plans, strict=True)
            video = torch.stack([apply(plan, clip[..., :h, :w], self.size) for clip, (plan, h, w) in clips])
        return replace(self, video=video, labels=labels, plans=None)


class ClipLoader:
    """Micro-batches of clips for one of `world` processes.

    The processes share each global batch of `batch_size * world` clips: process `rank` gets every `world`-th video of
    it, from `rank` on. Training draws a new order every epoch and omits an incomplete last global batch. Otherwise
    videos keep their order, each clip is the centre view (the segments' middles or the middle window, centre crop), and
    the last batch may be smaller.

    Args:
        samples: the videos, the same on every process.
        settings: how to decode and augment.
        batch_size: clips of a micro-batch; a multiple of `settings.augment.repeats` in training.
        train: draw at random; otherwise validation clips.
        seed: source of all randomness.
        rank: number of this process.
        world: number of processes.
        planned: number of videos for which a training epoch was planned, if more than there are now. The epoch keeps
            its length; if the present videos don't fill it, the first ones of its order occur twice.
        choose: chooses the frames of a training clip; worker processes get it, so it must pickle.

    Raises:
        ValueError: too few samples for a batch, sizes that don't fit, missing files, or a decoder that is not
            installed.
    """

    settings: DataSettings
    batch_size: int
    train: bool
    seed: int
    rank: int
    world: int
    repeats: int

    def __init__(
        self,
        samples: Sequence[Sample],
        settings: DataSettings,
        batch_size: int,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        planned: int | None = None,
        choose: Choose = train_indices,
    ) -> None:
        repeats = settings.augment.repeats if train else 1
        if batch_size < 1 or batch_size % repeats:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1 and a multiple of repeats = {repeats}")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world} processes; it must be from 0 to world - 1")
        missing = [str(sample.path) for sample in samples if not os.path.exists(sample.path)]
        if not samples or missing:
            raise ValueError(
                f"{len(missing)} of {len(samples)} videos are missing: "
                f"{', '.join(missing[:3]) or 'there are no samples'}; cast data check lists all faulty videos"
            )
        self.settings, self.batch_size, self.train, self.seed = settings, batch_size, train, seed
        self.rank, self.world, self.repeats = rank, world, repeats
        self._clips = _Clips(samples, settings, train, seed, choose)
        self._videos = planned if train and planned else len(samples)  # of an epoch
        self._per_step = batch_size // repeats * world  # videos of a global batch
        if train and len(samples) < self._per_step:
            raise ValueError(
                f"{len(samples)} videos make no batch of {self._per_step}; lower batch_size (in a recipe "
                "optim.total_batch and optim.micro_batch), or take fewer processes"
            )

    def __len__(self) -> int:
        full, rest = divmod(self._videos, self._per_step)
        if self.train:
            return full
        return full + (rest > self.rank)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of an epoch from number `start` on.

        Raises:
            VideoError: a video can't be read; the message names it.
            WorkerError: several workers in a row died at the same batch.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start is {start}; an epoch has batches 0 to {len(self) - 1}")
        keys = self._keys(epoch)[start:]
        if self.settings.workers == 0:
            for key in keys:
                yield _batch(self._clips[key])
            return
        done, deaths = 0, 0
        while done < len(keys):
            # When a worker dies, finished batches may be lost. So the next batch is made alone: if a worker dies again,
            # that batch is the cause.
            ahead = keys[done : done + 1] if deaths else keys[done:]
            try:
                for made in self._workers(ahead):
                    yield _batch(made)
                    done, deaths = done + 1, 0
            except WorkerDied as death:
                deaths += 1
                names = ", ".join(self._clips.names(keys[done]))
                if deaths == MOST_DEATHS:
                    raise WorkerError(
                        f"{deaths} workers died in a row at the batch of {names} ({death}); is there enough memory "
                        "(and /dev/shm)? Lower data.workers, or look for the file with cast data check"
                    ) from None
                _log.warning("a data worker died (%s); others take over, no clip is lost", death)

    def _keys(self, epoch: int) -> list[_Key]:
        """The key of each micro-batch of this process."""
        count, step = len(self._clips), self._per_step
        order = np.random.default_rng((_ORDER, self.seed, epoch)).permutation(count) if self.train else np.arange(count)
        order = np.resize(order, self._videos)  # begins again at the end of the order
        parts = [order[first : first + step][self.rank :: self.world] for first in range(0, self._videos, step)]
        return [_Key(epoch, tuple(part.tolist())) for part in parts[: len(self)]]

    def _workers(self, keys: list[_Key]) -> Iterator[_Made | VideoError]:
        loader = DataLoader(
            self._clips,
            batch_size=None,
            sampler=keys,
            collate_fn=_as_it_is,
            num_workers=min(self.settings.workers, len(keys)),
            prefetch_factor=AHEAD,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=context(),
        )
        yield from items(loader)


class _Key(NamedTuple):
    """Epoch and videos of a micro-batch."""

    epoch: int
    videos: tuple[int, ...]


class _Made(NamedTuple):
    """A micro-batch in the form that workers send: tensors, and small picklable values."""

    video: Tensor
    labels: dict[str, Tensor]
    names: list[str]
    plans: list[tuple[AugmentPlan, int, int]] | None
    size: int


def _batch(made: _Made | VideoError) -> Batch:
    if isinstance(made, VideoError):
        raise made
    return Batch(*made)


def _as_it_is(made: Any) -> Any:
    return made


class _Clips(Dataset[_Made | VideoError]):
    """Makes micro-batches from their keys, or returns the error: DataLoader would bury it in a traceback.

    Paths and labels are arrays, not objects. Reading an object counts its references, and so each forked worker would
    end up with its own copy of a list of hundreds of thousands.
    """

    def __init__(
        self, samples: Sequence[Sample], settings: DataSettings, train: bool, seed: int, choose: Choose
    ) -> None:
        self.settings, self.train, self.seed, self.choose = settings, train, seed, choose
        self.decoder = decoder(settings.decoder, settings.short_side)
        self.centre = Protocol(
            settings.sampling, 1, 1, settings.frames, settings.size, settings.decoder, settings.short_side
        )
        encoded = [str(sample.path).encode("utf-8", "surrogateescape") for sample in samples]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._paths = np.frombuffer(b"".join(encoded), np.uint8)
        self._heads = tuple(samples[0].labels)
        self._labels = np.array([[sample.labels[head] for head in self._heads] for sample in samples], np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    def names(self, key: _Key) -> list[str]:
        """The files of a micro-batch."""
        return [self._path(index) for index in key.videos]

    def _path(self, index: int) -> str:
        return bytes(self._paths[self._ends[index] : self._ends[index + 1]]).decode("utf-8", "surrogateescape")

    def __getitem__(self, key: _Key) -> _Made | VideoError:
        try:
            return self._make(key)
        except VideoError as error:
            return error

    def _make(self, key: _Key) -> _Made:
        augment = self.settings.augment
        repeats = augment.repeats if self.train else 1
        chosen = np.repeat(np.array(key.videos), repeats)
        labels = {head: torch.from_numpy(self._labels[chosen, column]) for column, head in enumerate(self._heads)}
        names = [self._path(index) for index in chosen]
        if not self.train:
            views = [self._view(index) for index in key.videos]
            return _Made(torch.stack(views), labels, names, None, 0)
        frames = [self._frames(key.epoch, index) for index in key.videos]
        stored = [torch.from_numpy(pictures).permute(0, 3, 1, 2) for pictures, _ in frames for _ in range(repeats)]
        plans = [self._plan(augment, pictures, rng) for pictures, rng in frames for _ in range(repeats)]
        size = self.settings.size
        if augment.on == "device":
            return _Made(_padded(stored), labels, names, plans, size)
        clips = [apply(plan, video, size) for video, (plan, _, _) in zip(stored, plans, strict=True)]
        return _Made(torch.stack(clips), labels, names, None, size)

    def _view(self, index: int) -> Tensor:
        """The one clip of a validation video, float32 `[3, T, S, S]`."""
        with self._advice(index) as path:
            return normalise(self.centre.read(path)[0])

    def _frames(self, epoch: int, index: int) -> tuple[np.ndarray, np.random.Generator]:
        """The stored frames of a training clip, uint8 `[T, H, W, 3]`, and the generator that augments them."""
        rng = np.random.default_rng((_CLIP, self.seed, epoch, index))
        with self._advice(index) as path:
            length = self.decoder.frame_count(path, threads=1)
            indices = self.choose(length, rng, self.settings.sampling, self.settings.frames)
            return self.decoder.read(path, indices, threads=1), rng

    @contextmanager
    def _advice(self, index: int) -> Iterator[str]:
        """Yield a video's path; on a VideoError, add the advice how to skip the video."""
        path = self._path(index)
        try:
            yield path
        except VideoError as error:
            advice = how_to_skip(path, self.settings.root, self.settings.skip_list)
            raise VideoError(f"{error}; {advice}") from None

    def _plan(
        self, augment: AugmentSettings, pictures: np.ndarray, rng: np.random.Generator
    ) -> tuple[AugmentPlan, int, int]:
        height, width = pictures.shape[1:3]
        return draw(augment, self.settings.size, height, width, rng), height, width


def _padded(videos: Sequence[Tensor]) -> Tensor:
    """Videos uint8 `[T, 3, H, W]` of different sizes in one tensor, each in the top left corner."""
    height, width = (max(video.shape[axis] for video in videos) for axis in (2, 3))
    result = torch.zeros(len(videos), *videos[0].shape[:2], height, width, dtype=torch.uint8)
    for place, video in zip(result, videos, strict=True):
        place[..., : video.shape[2], : video.shape[3]] = video
    return result
