"""Run a model over a test set: batched, on any number of processes, exact, and resumable after a kill.

The videos are cut into chunks. One process computes a chunk with all clips of its videos. So the same clips share a
forward pass for any number of processes, and the answers have equal bits (on equal hardware). Nothing pads the data, so
no sample is counted twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cast.evaluation.parts import Parts
from cast.evaluation.predictions import Predictions, from_records, record
from cast.ground.files import printable
from cast.ground.processes import join_processes, peak_memory
from cast.metrics import average_views
from cast.video.annotations import Sample
from cast.video.files import VideoError
from cast.video.views import Protocol, normalise
from cast.video.workers import WorkerDied, WorkerError, context, items

#: Called after each chunk of this process with videos done and all videos, both of this process.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Run:
    """Settings of a run.

    Args:
        batch_size: clips in a forward pass. If it is large enough, a batch has all clips of its videos.
        workers: decoding processes; 0 decodes between forward passes.
        dtype: of the model and the clips: float32, bfloat16 or float16.
    """

    batch_size: int = 12
    workers: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(
                f"batch_size is {self.batch_size} and workers is {self.workers}; they must be at least 1 and 0"
            )


@dataclass
class Cost:
    """The cost of a run, over all processes. Decoding is included."""

    clips: int = 0  # computed by this run, without those that an earlier one had finished
    seconds: float = 0.0
    processes: int = 1
    device: str = ""
    peak_memory: int = 0  # bytes, see cast.ground.processes.peak_memory
    resumed: int = 0  # videos that an earlier run had finished


def evaluate(
    model: nn.Module,
    samples: Sequence[Sample],
    classes: Mapping[str, Sequence[str]],
    protocol: Protocol,
    run: Run | None = None,
    about: Mapping[str, Any] | None = None,
    parts: Parts | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Predictions, Cost]:
    """Answers of a model on all samples; every process gets all of them.

    Args:
        model: from clips [B, 3, frames, size, size] to logits by head; put into evaluation mode, and moved to the
            process's device and `run.dtype`.
        samples: the videos; labels may be missing, but then from all of them.
        classes: head -> class names.
        protocol: the clips of a video.
        run: settings of the run.
        about: the entry `about` of the predictions.
        parts: storage of finished videos until the end; None for none.
        progress: called after every chunk.

    Raises:
        ValueError: no samples, two with one name, other heads than those of `classes`, or an answer that is not a
            number.
        VideoError: a file can't be read as a video; finished videos are kept in `parts`.
        WorkerError: a decoding process died; finished videos are kept in `parts`.
    """
    run, state = run or Run(), join_processes()
    names = sample_names(samples)
    done = parts.load() if parts else {}
    state.wait_for_everyone()  # before any process writes into files that others still read
    own = _share(len(samples), max(1, run.batch_size // protocol.clips), state.process_index, state.num_processes)
    fresh, mine = [], []
    for chunk in own:
        if all(names[index] in done for index in chunk):
            mine += [done[names[index]] for index in chunk]
        else:  # whole chunks only, so that the same clips share a forward pass as in an uninterrupted run
            fresh.append(chunk)
    finished, total = len(mine), sum(map(len, own))
    model = model.eval().to(state.device, run.dtype)
    began = time.perf_counter()
    for chunk, clips in _decoded(fresh, [sample.path for sample in samples], protocol, run.workers):
        answers = _answers(model, clips.to(state.device), run, classes, [names[index] for index in chunk])
        records = [
            record(names[index], samples[index].labels, _row(answers[0], row), _row(answers[1], row))
            for row, index in enumerate(chunk)
        ]
        if parts:
            parts.append(records)
        mine += records
        progress(len(mine), total)
    state.wait_for_everyone()
    cost = Cost(
        clips=(total - finished) * protocol.clips,
        seconds=time.perf_counter() - began,
        device=device_name(state.device),
        peak_memory=peak_memory(state.device),
        resumed=finished,
    )
    every: list[Any] = gather_object(mine)
    costs: list[Any] = gather_object([cost])
    by_name = {answer["video"]: answer for answer in every}
    if len(every) != len(samples) or by_name.keys() != set(names):
        raise RuntimeError(f"{len(every)} answers for {len(samples)} samples: the processes saw different data")
    predictions = from_records([by_name[name] for name in names], classes, about or {})
    return predictions, _together(costs)


def sample_names(samples: Sequence[Sample]) -> list[str]:
    """A name for each sample: its file's, with as many folders as are needed to separate equal names.

    Raises:
        ValueError: no samples, or one file twice.
    """
    depth = 1
    while True:
        names = [printable("/".join(sample.path.parts[-depth:])) for sample in samples]
        if len(set(names)) == len(names) and names:
            return names
        if not names:
            raise ValueError("there are no samples")
        if depth > max(len(sample.path.parts) for sample in samples):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the annotations have {twice} more than once; every video may be there once")
        depth += 1


def _share(samples: int, size: int, process: int, processes: int) -> list[range]:
    """The chunks of `size` samples that a process answers: every `processes`-th."""
    starts = range(0, samples, size)
    return [range(start, min(start + size, samples)) for start in starts[process::processes]]


class _Videos(Dataset[Tensor | VideoError]):
    """All clips of a video, or the error that it raised: DataLoader would bury it in a traceback."""

    def __init__(self, paths: Sequence[Any], protocol: Protocol) -> None:
        self.paths, self.protocol = paths, protocol

    def __getitem__(self, index: int) -> Tensor | VideoError:
        try:
            return self.protocol.read(self.paths[index])
        except VideoError as error:
            return error


def _decoded(
    chunks: Sequence[range], paths: Sequence[Any], protocol: Protocol, workers: int
) -> Iterator[tuple[range, Tensor]]:
    """Each range of video indices with these videos' decoded clips, uint8 [videos, clips, 3, T, side, side]."""
    order = [index for chunk in chunks for index in chunk]
    loader = DataLoader(
        _Videos(paths, protocol),
        batch_size=None,
        sampler=order,
        num_workers=workers,
        multiprocessing_context=context() if workers else None,
    )
    videos = items(loader)
    for chunk in chunks:
        try:
            yield chunk, torch.stack([_clips(next(videos)) for _ in chunk])
        except WorkerDied as death:
            names = ", ".join(str(paths[index]) for index in chunk)
            raise WorkerError(
                f"a decoding process died at or soon after {names} ({death}); is there enough memory (and /dev/shm)? "
                "The same command continues the run: lower --workers, or look for the file with cast data check"
            ) from None


def _clips(read: Tensor | VideoError) -> Tensor:
    if isinstance(read, VideoError):
        raise read
    return read


@torch.inference_mode()
def _answers(
    model: nn.Module, clips: Tensor, run: Run, classes: Mapping[str, Sequence[str]], names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Probabilities [videos, classes] and each clip's best guess [videos, clips], by head, on the CPU."""
    videos, views = clips.shape[:2]
    logits = [model(normalise(part).to(run.dtype)) for part in clips.flatten(0, 1).split(run.batch_size)]
    probabilities, guesses = {}, {}
    for head, parts in {head: [part[head] for part in logits] for head in logits[0]}.items():
        by_view = torch.cat(parts).unflatten(0, (videos, views))
        probabilities[head] = average_views(by_view)
        guesses[head] = by_view.argmax(-1).cpu()
    found = {head: values.shape[1] for head, values in probabilities.items()}
    wanted = {head: len(of_head) for head, of_head in classes.items()}
    if found != wanted:
        raise ValueError(f"the model's heads are {found} and the data set's {wanted}; they must be the same")
    for head, values in probabilities.items():
        bad = [name for name, row in zip(names, values, strict=True) if not row.isfinite().all()]
        if bad:
            raise ValueError(
                f"the model's {head} is not a number for {', '.join(bad[:3])}: its weights have diverged, or "
                f"{str(run.dtype).removeprefix('torch.')} is too narrow for it; try float32"
            )
    return probabilities, guesses


def _row(tensors: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {head: tensor[row] for head, tensor in tensors.items()}


def _together(costs: Sequence[Cost]) -> Cost:
    return Cost(
        clips=sum(cost.clips for cost in costs),
        seconds=max(cost.seconds for cost in costs),
        processes=len(costs),
        device=costs[0].device,
        peak_memory=max(cost.peak_memory for cost in costs),
        resumed=sum(cost.resumed for cost in costs),
    )


def device_name(device: torch.device) -> str:
    """The accelerator's name, or `CPU` with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type
