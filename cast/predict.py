"""Name the action in one video file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from cast.metrics import average_views, top_pairs
from cast.model import CAST
from cast.video.dataset import views_of
from cast.video.reader import frame_count
from cast.video.sampling import Sampling

PathLike = str | os.PathLike[str]

#: File with the class names in a checkpoint's directory: {"verb": [...], "noun": [...]} or {"action": [...]}.
LABELS = "labels.json"


@dataclass(frozen=True)
class Guess:
    """One answer. `index` is the class, or (verb, noun) for an action of a compositional model."""

    label: str
    index: int | tuple[int, int]
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a model sees in a video. `guesses` are by head, best first."""

    video: str
    frames: int
    views: int
    guesses: dict[str, list[Guess]]

    def to_json(self) -> str:
        """The prediction as a JSON object."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def load_labels(directory: PathLike, classes: Mapping[str, int]) -> dict[str, list[str]]:
    """Class names by head from `labels.json` in `directory`, or the class indices where there is no such file.

    Args:
        directory: a checkpoint's directory.
        classes: number of classes by head.

    Raises:
        ValueError: the file is no JSON, lacks a head or has another number of names than the head has classes.
    """
    path = Path(directory) / LABELS
    if not path.exists():
        return {head: [str(index) for index in range(count)] for head, count in classes.items()}
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    _check_names(str(path), names, classes)
    return {head: [str(name) for name in names[head]] for head in classes}


def _check_names(what: str, names: object, classes: Mapping[str, int]) -> None:
    for head, count in classes.items():
        given = names.get(head) if isinstance(names, Mapping) else None
        number = len(given) if isinstance(given, Sequence) and not isinstance(given, str) else None
        if number != count:
            found = "none" if number is None else f"{number} names"
            raise ValueError(
                f"{what}: must have a list of {count} names for {head!r}, as the model has; it has {found}"
            )


@torch.inference_mode()
def predict(
    model: CAST,
    video: PathLike,
    labels: Mapping[str, Sequence[str]],
    top: int = 5,
    sampling: Sampling = "uniform",
) -> Prediction:
    """Average the model's probabilities over all views of the published test protocol.

    Args:
        model: any CAST, on any device; it is put into evaluation mode.
        video: a video file.
        labels: class names by head.
        top: guesses per head, at least 1; fewer where there are fewer classes.
        sampling: "uniform" (EPIC-Kitchens-100, Something-Something V2; 2 x 3 views) or "dense" (Kinetics-400; 5 x 3).

    Returns:
        Guesses for each head. A compositional model also gets `action`: pairs of verb and noun, ranked by the
        product of their probabilities.

    Raises:
        VideoError: the file can't be read as a video.
        ValueError: `top` is below 1, or `labels` lacks a head or has another number of names than it has classes.
    """
    if top < 1:
        raise ValueError(f"top is {top}; it must be at least 1")
    _check_names("labels", labels, model.config.classes)
    model.eval()
    config, parameter = model.config, next(model.parameters())
    # One view at a time: six of the base model's would need six times its memory.
    logits = [
        model(clip[None].to(parameter))
        for clip in views_of(video, config.image_size, sampling, frames=config.num_frames)
    ]
    probabilities = {head: average_views(torch.cat([view[head] for view in logits])).cpu() for head in logits[0]}
    guesses = {head: _best(probabilities[head], labels[head], top) for head in _ordered(probabilities)}
    if config.compositional:
        guesses["action"] = _best_pairs(probabilities["verb"], probabilities["noun"], labels, top)
    return Prediction(os.fspath(video), frame_count(video), len(logits), guesses)


def _ordered(heads: Mapping[str, Tensor]) -> list[str]:
    return sorted(heads, reverse=True)  # verb before noun, as people say it


def _best(probabilities: Tensor, labels: Sequence[str], top: int) -> list[Guess]:
    values, indices = probabilities.topk(min(top, len(probabilities)))
    return [Guess(labels[i], i, p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)]


def _best_pairs(verb: Tensor, noun: Tensor, labels: Mapping[str, Sequence[str]], top: int) -> list[Guess]:
    values, pairs = top_pairs(verb[None], noun[None], min(top, len(verb) * len(noun)))
    return [
        Guess(f"{labels['verb'][v]} {labels['noun'][n]}", (v, n), p)
        for (v, n), p in zip(pairs[0].tolist(), values[0].tolist(), strict=True)
    ]


def table(prediction: Prediction) -> Table:
    """The guesses side by side, probabilities in percent."""
    result = Table()
    result.add_column("", justify="right", style="dim")
    for head in prediction.guesses:
        result.add_column(head, overflow="fold")
        result.add_column("%", justify="right", no_wrap=True)
    for row in range(max(map(len, prediction.guesses.values()))):
        cells = [str(row + 1)]
        for guesses in prediction.guesses.values():
            cells += (
                [escape(guesses[row].label), f"{100 * guesses[row].probability:.1f}"]
                if row < len(guesses)
                else ["", ""]
            )
        result.add_row(*cells, style="bold" if row == 0 else None)
    return result


def main(
    video: PathLike, checkpoint: PathLike, top: int = 5, as_json: bool = False, sampling: Sampling = "uniform"
) -> None:
    """Print the prediction of the model in the directory `checkpoint` for `video`.

    Raises:
        VideoError: the file can't be read as a video.
        ValueError: there is no usable checkpoint, or `top` is below 1.
    """
    frame_count(video)  # a bad file should not have to wait for the model
    if not Path(checkpoint).is_dir():
        raise ValueError(f"{os.fspath(checkpoint)}: no such directory; give one that save_pretrained wrote")
    try:
        model = CAST.from_pretrained(checkpoint)
    except TypeError as error:  # a configuration with unknown fields
        raise ValueError(f"{Path(checkpoint) / 'config.json'}: {error}") from None
    labels = load_labels(checkpoint, model.config.classes)
    prediction = predict(model.to("cuda" if torch.cuda.is_available() else "cpu"), video, labels, top, sampling)
    if as_json:
        print(prediction.to_json())
    else:
        console = Console()
        console.print(
            f"{Path(video).name}: {prediction.frames} frames, {prediction.views} views", highlight=False, markup=False
        )
        console.print(table(prediction))
