"""Match the class names of a model with those of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cast.video.annotations import Sample
from cast.video.datasets import VideoSet

Classes = Mapping[str, Sequence[str]]


def agree(own: Classes, videos: VideoSet, samples: Sequence[Sample]) -> tuple[Classes, list[Sample]]:
    """The names of the model's classes, and the samples with labels in the model's order.

    A test set need not show every class, nor name them in the model's order: the name defines a label's meaning. If one
    side has only numbers, they are the model's.

    Args:
        own: the model's class names by head; numbers if it has none.
        videos: the data set; it may have no labels.
        samples: of the data set.

    Raises:
        ValueError: other heads, classes that the model does not have, or an unknown order: the data set has names, and
            the model has more classes without names. The message names the cure.
    """
    if not videos.classes:
        return own, list(samples)
    if videos.classes.keys() != own.keys():
        raise ValueError(
            f"the model answers {' and '.join(own)}, the data set has {' and '.join(videos.classes)}; test on "
            "annotations with labels of the model's kind, or without any"
        )
    names: dict[str, Sequence[str]] = {}
    places: dict[str, list[int]] = {}
    for head, theirs in videos.classes.items():
        ours = list(own[head])
        unnamed, numbered = _numbers(len(ours)), list(theirs) == _numbers(len(theirs))
        if ours == unnamed and not numbered and len(theirs) == len(ours):
            ours = list(theirs)
        stated = videos.settings.classes
        if numbered and len(theirs) != len(ours) and isinstance(stated, dict) and head in stated:
            raise ValueError(_other_number(head, len(ours), len(theirs)))
        place = {name: index for index, name in enumerate(unnamed if numbered else ours)}
        if unknown := [name for name in theirs if name not in place]:
            raise ValueError(_unknown(head, unknown, ours, ours == unnamed))
        names[head], places[head] = ours, [place[name] for name in theirs]
    return names, [
        replace(sample, labels={head: places[head][label] for head, label in sample.labels.items()})
        for sample in samples
    ]


def _numbers(count: int) -> list[str]:
    return [str(index) for index in range(count)]


def _other_number(head: str, ours: int, theirs: int) -> str:
    return (
        f"the model has {ours} classes of {head!r}, data.classes says {theirs}: give it the model's number, or leave "
        "it out where the data set shows only some of them"
    )


def _unknown(head: str, unknown: Sequence[str], ours: Sequence[str], unnamed: bool) -> str:
    told = f"{', '.join(map(repr, unknown[:3]))}{', ...' if len(unknown) > 3 else ''}"
    if unnamed:
        return (
            f"the data set names classes of {head!r} ({told}), and the model has {len(ours)} without names: give the "
            "data set the class names of the training (data.classes), or the checkpoint a labels.json with them"
        )
    return (
        f"the data set has {len(unknown)} classes of {head!r} that the model does not have: {told}; it has "
        f"{', '.join(map(repr, ours[:3]))}{', ...' if len(ours) > 3 else ''}. Give the data set the class names of the "
        "training (data.classes), or leave those videos out"
    )
