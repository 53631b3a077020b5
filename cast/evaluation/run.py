"""`cast evaluate`: from a checkpoint and a data set to predictions, metrics and a report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from cast.evaluation.cost import ModelCost, model_cost
from cast.evaluation.inference import Cost, Run, evaluate, sample_names
from cast.evaluation.names import Classes, agree
from cast.evaluation.parts import Parts
from cast.evaluation.predictions import Predictions, read_predictions, write_predictions
from cast.evaluation.report import Evidence, html
from cast.evaluation.report.curves import Log, read_log
from cast.evaluation.submission import submission, write_submission
from cast.evaluation.subsets import read_subsets
from cast.evaluation.summary import summarise
from cast.ground.files import printable, write_json, write_text
from cast.ground.optional import require
from cast.ground.processes import join_processes
from cast.ground.sampling import Sampling
from cast.loading.ensemble import PREDICTIONS, Loaded, load_models
from cast.model.labels import numbers
from cast.video.annotations import Sample
from cast.video.datasets import VideoSet, open_dataset
from cast.video.views import Protocol

PathLike = str | os.PathLike[str]
#: File with the cost of a run.
COST = "cost.json"
#: A training's log, in its directory.
LOG = "log.jsonl"
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Options:
    """The options of `cast evaluate`; see its help."""

    split: str = "val"
    sampling: Sampling | None = None
    views: int = 0
    crops: int = 3
    batch_size: int = 12
    workers: int = 2
    dtype: Dtype = "float32"
    baselines: Mapping[str, PathLike] = field(default_factory=dict)
    log: PathLike | None = None
    format: Literal["jsonl", "parquet"] = "jsonl"
    sls: Sequence[int] | None = None
    trust_pickle: bool = False


@dataclass(frozen=True)
class _Answered:
    """Answers and their origin; `model` and `cost` are None if the answers were read from a file."""

    predictions: Predictions
    protocol: Protocol
    model: nn.Module | None = None
    cost: Cost | None = None

    @property
    def size(self) -> ModelCost | None:
        """The model's own cost."""
        return None if self.model is None else model_cost(self.model, self.protocol.frames, self.protocol.size)


def main(
    checkpoints: Sequence[PathLike], dataset: PathLike, out: PathLike, options: Options | None = None
) -> dict[str, Any]:
    """Evaluate, and write `predictions.*`, `metrics.json`, `report.html`, `cost.json` and, if asked, `submission.zip`.

    Under torchrun or accelerate every process takes part and the first one writes. A killed run is continued; a
    finished one is read, not repeated.

    Args:
        checkpoints: one that `load_checkpoint` takes, several whose probabilities are averaged, or a predictions file
            for a new report.
        dataset: any argument of `open_dataset`.
        out: directory of the results.
        options: all other settings.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data set or option that can't be used; the message says why.
        MissingExtraError: matplotlib or Pillow, which the report needs, or pyarrow for Parquet is not installed.
    """
    options, out = options or Options(), Path(out)
    _check_before(options)
    _check_writable(out)
    videos = open_dataset(dataset)
    samples = videos.samples(options.split)
    if options.sls is not None and len(samples) < len(videos.all_samples(options.split)):
        raise ValueError(
            f"{videos.skipped(options.split)}: a submission must answer every video, so mend these and run cast data "
            "check again, or evaluate without --sls"
        )
    if len(checkpoints) == 1 and Path(checkpoints[0]).suffix in PREDICTIONS:
        answers = read_predictions(checkpoints[0])
        samples, subsets = _fitted(answers.classes, videos, samples, options.split)[1:]
        answered = _read_answers(Path(checkpoints[0]), answers, samples)
    else:
        loaded = load_models(checkpoints, options.trust_pickle, options.sampling)
        names = loaded.classes or numbers(loaded.config.classes)
        classes, samples, subsets = _fitted(names, videos, samples, options.split)
        answered = _answers(loaded, classes, videos, samples, out, options)
    if not join_processes().is_main_process:
        return {}
    predictions = replace(answered.predictions, subsets=subsets)
    if predictions.model in options.baselines:
        raise ValueError(f"a baseline cannot be called {predictions.model!r}: the evaluated model is")
    baselines = {
        name: read_predictions(path).aligned_to(predictions, f"the baseline {os.fspath(path)}")
        for name, path in options.baselines.items()
    }
    log, fault = _training_log(checkpoints, options)
    summary = summarise(predictions, baselines)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", summary)
    if options.sls is not None:
        write_submission(out / "submission.zip", predictions, options.sls)
    evidence = Evidence(
        title=f"{predictions.model} on {printable(videos.root.resolve().name)}, {options.split}",
        predictions=predictions,
        protocol=answered.protocol,
        baselines=baselines,
        paths=[sample.path for sample in samples],
        model=answered.model,
        model_cost=answered.size,
        cost=answered.cost,
        log=log,
        facts={"skip list": videos.skipped(options.split), "torch": torch.__version__, **fault},
    )
    write_text(out / "report.html", html(evidence))
    _print(summary, out)
    return summary


def _check_before(options: Options) -> None:
    """Find faults before hours of work, not after them."""
    for module in ("matplotlib", "PIL"):
        require(module, "report")
    if options.format == "parquet":
        require("pyarrow", "parquet")
    if options.log is not None:
        read_log(options.log)
    for path in options.baselines.values():
        if not Path(path).is_file():
            raise FileNotFoundError(f"{os.fspath(path)}: no such predictions file for a baseline")


def _check_writable(out: Path) -> None:
    """Raise if results cannot be written; writes nothing itself."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"--out is {out}, but {place} is a file; name a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--out is {out}, but {place} may not be written to; name another directory")


def _training_log(checkpoints: Sequence[PathLike], options: Options) -> tuple[Log | None, dict[str, str]]:
    """The learning curves, and a note for the report if an unnamed log has none; it may be another program's."""
    if options.log is not None:
        return read_log(options.log), {}
    found = find_log(checkpoints[0]) if len(checkpoints) == 1 else None  # an ensemble has no training
    if found is None:
        return None, {}
    try:
        return read_log(found), {}
    except ValueError as error:
        return None, {"learning curves": f"left out: {error}"}


def find_log(path: str | os.PathLike[str]) -> Path | None:
    """The log of the training that made a checkpoint, if it is in the training's directory."""
    if not Path(path).exists():  # a published name; a log in the working directory is not its own
        return None
    places = [Path(path) / LOG, Path(path).parent / LOG]
    return next((place for place in places if place.is_file()), None)


def _fitted(
    own: Classes, videos: VideoSet, samples: Sequence[Sample], split: str
) -> tuple[Classes, list[Sample], Mapping[str, Tensor]]:
    """The model's class names, the samples with labels in the model's order, and the subsets of hard samples."""
    counts = {head: len(names) for head, names in own.items()}
    theirs = {head: len(names) for head, names in videos.classes.items()}
    classes, fitted = agree(own, videos, samples)
    # The organisers' lists number rare classes like the data set, if it has all classes.
    subsets = read_subsets(videos.root, split, samples if theirs == counts else fitted, counts if theirs else {})
    return classes, fitted, subsets


def _read_answers(path: Path, predictions: Predictions, samples: Sequence[Sample]) -> _Answered:
    names = sample_names(samples)
    if list(predictions.videos) != names:
        raise ValueError(
            f"{path} has answers to {len(predictions.videos)} videos, the data set has {len(names)}, and they are not "
            "the same in the same order: give the data set and the split that the file was made on"
        )
    try:
        protocol = Protocol(**predictions.about["protocol"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f'{path} does not say how the test was made: its first line needs "about": {{"protocol": ...}} with '
            f"the fields of {json.dumps(Protocol().to_dict())}"
        ) from None
    return _Answered(predictions, protocol, cost=_read_cost(path.parent))


def _answers(
    loaded: Loaded, classes: Classes, videos: VideoSet, samples: Sequence[Sample], out: Path, options: Options
) -> _Answered:
    config = loaded.config
    sampling, why = choose_sampling(options.sampling, loaded.sampling, videos)
    protocol = Protocol(
        sampling,
        options.views,
        options.crops,
        config.num_frames,
        config.image_size,
        videos.settings.decoder,
        loaded.short_side,
    )
    if options.sls is not None:
        _check_submission(config.classes, options.sls)
    state = join_processes()
    if state.is_main_process:
        Console().print(f"{protocol.name} views, {sampling} sampling: {why}", highlight=False, soft_wrap=True)
    about = {
        **loaded.about(),
        "dataset": printable(videos.root),
        "split": options.split,
        "dtype": options.dtype,
        "protocol": protocol.to_dict(),
    }
    path = out / f"predictions.{options.format}"
    if path.exists():
        found = read_predictions(path)
        if found.about != about or list(found.videos) != sample_names(samples):
            raise ValueError(f"{path} holds another evaluation, {dict(found.about)}: choose another --out")
        return _Answered(found, protocol, loaded.model, _read_cost(out))
    out.mkdir(parents=True, exist_ok=True)
    # Parts of an earlier version are not mixed with new ones: it averaged in float32 and cut some clips elsewhere.
    parts = Parts(out / "unfinished", {**about, "videos": len(samples), "average": "float64"}, state.process_index)
    run = Run(options.batch_size, options.workers, getattr(torch, options.dtype))
    with _bar(state.is_main_process) as progress:
        predictions, cost = evaluate(loaded.model, samples, classes, protocol, run, about, parts, progress)
    if state.is_main_process:
        write_json(out / COST, asdict(cost))
        write_predictions(path, predictions)
    state.wait_for_everyone()
    if state.is_main_process:
        parts.remove()
    return _Answered(predictions, protocol, loaded.model.float(), cost)


def choose_sampling(asked: Sampling | None, model: Sampling | None, videos: VideoSet) -> tuple[Sampling, str]:
    """The sampling of a test, and its origin: the caller, else the model, else the data set.

    Args:
        asked: the caller's choice, or None.
        model: the model's training's, or None.
        videos: the data set.

    Raises:
        ValueError: the caller chose none, and the model and the data set's YAML file name different ones.
    """
    if asked is not None:
        return asked, "as asked for"
    stated = f"data.sampling in {videos.stated}"
    if model is None:
        guess = f"the default, because neither the model nor {videos.root} names one; --sampling names another"
        return videos.sampling, guess if videos.stated is None else f"{stated}; the model does not say"
    if videos.stated is not None and videos.sampling != model:
        raise ValueError(
            f"the model was trained with {model} sampling, {stated} is {videos.sampling}: correct the file, or "
            f"say which one is meant with --sampling {model} or --sampling {videos.sampling}"
        )
    return model, "as the model was trained"


def _read_cost(directory: Path) -> Cost | None:
    """The cost of the run that wrote a directory's predictions, in its own file because it varies between runs."""
    path = directory / COST
    return Cost(**json.loads(path.read_text())) if path.is_file() else None


def _check_submission(counts: Mapping[str, int], levels: Sequence[int]) -> None:
    empty = {head: torch.full((1, count), 1 / count) for head, count in counts.items()}
    names = {head: [str(index) for index in range(count)] for head, count in counts.items()}
    submission(Predictions(["video.mp4"], empty, {}, {}, names), levels)


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar of this process's videos; the processes' shares differ by at most one chunk."""
    if not shown:
        yield lambda done, total: None
        return
    columns = (
        TextColumn("videos"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns) as bar:
        task = bar.add_task("videos", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(summary: Mapping[str, Any], out: Path) -> None:
    console = Console()
    if "metrics" in summary:
        own = summary["about"].get("model", "CAST")
        models = {own: summary["metrics"]} | {name: e["metrics"] for name, e in summary["baselines"].items()}
        table = Table(title=f"{summary['videos']} videos, percent")
        table.add_column("")
        for name in models:
            table.add_column(escape(name), justify="right")
        for figure in summary["metrics"]:
            cells = [f"{figures[figure]:.2f}" if figure in figures else "" for figures in models.values()]
            table.add_row(figure, *cells)
        console.print(table)
    else:
        console.print(f"{summary['videos']} videos; {summary['note']}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {out / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
