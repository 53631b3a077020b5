"""Videos in the report: their choice, their frames with all answers, and the streams' attention in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cast.evaluation.attention import Attention, cross_attention
from cast.evaluation.predictions import Predictions
from cast.evaluation.report import plots
from cast.evaluation.report.html import strip, verdict
from cast.evaluation.summary import ordered, tasks
from cast.ground.optional import require
from cast.model import CAST
from cast.video.decoders import decoder
from cast.video.views import Protocol, normalise

#: Frames shown of a video.
_FRAMES = 8
#: Number of blocks whose attention is shown: the first, the middle and the last with an exchange.
_BLOCKS = 3


@dataclass(frozen=True)
class Group:
    """Videos with the same outcome; `videos` are numbers of samples, `total` counts all with this outcome."""

    title: str
    videos: list[int]
    total: int


def chosen(predictions: Predictions, baselines: Mapping[str, Predictions], each: int = 2) -> list[Group]:
    """Up to `each` videos of every outcome, evenly spaced over the test set, not picked by hand.

    Outcomes are whether the model is right (about the action, or its only head) and whether any baseline is.
    """
    task = tasks(predictions)[-1]
    ours = predictions.hits(task)
    able = [baseline for baseline in baselines.values() if task in tasks(baseline)]
    if able:
        theirs = torch.stack([baseline.hits(task) for baseline in able]).any(0)
        kinds = {
            f"Only {predictions.model} is right": ours & ~theirs,
            f"{predictions.model} and a baseline are right": ours & theirs,
            "Only a baseline is right": ~ours & theirs,
            "All are wrong": ~ours & ~theirs,
        }
    else:
        kinds = {"Right": ours, "Wrong": ~ours}
    groups = []
    for title, mask in kinds.items():
        numbers = mask.nonzero()[:, 0].tolist()
        count = min(each if able else 2 * each, len(numbers))
        picked = [numbers[(2 * place + 1) * len(numbers) // (2 * count)] for place in range(count)]
        groups.append(Group(title, picked, len(numbers)))
    return [group for group in groups if group.total]


def video_rows(groups: Sequence[Group], models: Mapping[str, Predictions], paths: Sequence[Path]) -> str:
    """Every chosen video's frames beside all models' answers; the first of `models` is the evaluated one."""
    parts = []
    for group in groups:
        parts.append(f"<h3>{escape(group.title)} <small>({group.total} videos)</small></h3>")
        parts += [_video(number, models, paths[number]) for number in group.videos]
    return "\n".join(parts)


def _video(number: int, models: Mapping[str, Predictions], path: Path) -> str:
    own = next(iter(models.values()))
    heads = ordered(own.probabilities)
    truth = " ".join(own.classes[head][int(own.labels[head][number])] for head in heads)
    rows = [f"<tr><th>truth</th><th>{escape(truth)}</th></tr>"]
    first, *others = models
    for name in (*others, first):  # the evaluated model last, after the others' answers
        predictions = models[name]
        words = "<br>".join(_guess(predictions, head, number) for head in heads if head in predictions.probabilities)
        rows.append(f"<tr><td>{escape(name)}</td><td>{words}</td></tr>")
    video = own.videos[number]
    picture = strip(_frames(path), f"Frames of {video}")
    return (
        f'<div class="clip"><div>{picture}<br><small class="note">{escape(video)}</small></div>'
        f"<table>{''.join(rows)}</table></div>"
    )


def _guess(predictions: Predictions, head: str, number: int) -> str:
    scores = predictions.probabilities[head][number]
    best = int(scores.argmax())
    right = best == int(predictions.labels[head][number])
    return f"{verdict(predictions.classes[head][best], right)} <small>{100 * float(scores[best]):.0f} %</small>"


def _frames(path: Path) -> list[np.ndarray]:
    reader = decoder("pyav")
    length = reader.frame_count(path, threads=1)
    wanted = ((np.arange(_FRAMES) * 2 + 1) * length // (2 * _FRAMES)).tolist()
    return list(reader.read(path, wanted, threads=1))


def attention_rows(model: CAST, protocol: Protocol, videos: Mapping[str, Path]) -> str:
    """The attention of each stream to the other, for some videos by title: the middle clip of the first view."""
    parts = []
    parameter = next(model.parameters())
    for title, path in videos.items():
        clip = protocol.read(path)[(protocol.crops - 1) // 2]
        maps = cross_attention(model, normalise(clip.to(parameter.device))[None].to(parameter))
        parts.append(f"<h3>{escape(title)}</h3>{_attention(clip, maps, model)}")
    return "\n".join(parts)


def _attention(clip: Tensor, maps: Sequence[Mapping[str, Attention]], model: CAST) -> str:
    tubelet = model.config.tubelet_size
    frames = clip[:, tubelet - 1 :: tubelet].permute(1, 2, 3, 0).numpy()  # the spatial stream's frames
    numbers = sorted({0, (len(maps) - 1) // 2, len(maps) - 1})[:_BLOCKS]
    blocks = [index for index in range(model.config.depth) if model.config.exchanges(index)]
    parts = [f'<div class="clip">{strip(list(frames), "The frames", 96, 860)}</div>']
    for direction, words in (
        ("s2t", "motion asks appearance (S2T)"),
        ("t2s", "appearance asks motion (T2S)"),
    ):
        heats = []
        for number in numbers:
            found = maps[number].get(direction)
            if found is None:
                continue
            name = f"block {blocks[number] + 1}"
            if found.over_space is not None:
                space = found.over_space[0]
                picture = strip(_overlay(frames, space, model), f"{words}, {name}", 96, 860)
                note = f"{words}, {name}; the brightest patch gets {float(space.max()):.1f} times its even share"
                parts.append(f'<div class="clip"><div>{picture}<br><small class="note">{note}</small></div></div>')
            if found.over_time is not None:
                drawn = plots.heat(found.over_time[0].numpy(), "moment of the answer", f"moment that asks, {name}")
                heats.append(f"<div>{drawn}</div>")
        if heats:
            parts.append(f'<div class="note">{words}, weight by moment</div><div class="pair">{"".join(heats)}</div>')
    return "\n".join(parts)


def _overlay(frames: np.ndarray, space: Tensor, model: CAST) -> list[np.ndarray]:
    """Frames [T, S, S, 3], dimmed, under the attention [T, N] as colour."""
    colours = require("matplotlib", "report").colormaps["magma"]
    side = model.config.image_size // model.config.patch_size
    heat = torch.nn.functional.interpolate(
        (space / space.max()).view(-1, 1, side, side), size=frames.shape[1:3], mode="bilinear"
    )
    coloured = 255 * colours(heat[:, 0].numpy())[..., :3]
    grey = frames.mean(-1, keepdims=True)
    return list((0.4 * grey + 0.6 * coloured).astype(np.uint8))
