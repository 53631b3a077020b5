"""All figures of an evaluation, by name, for `metrics.json` and the report. Accuracies are in percent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from cast.evaluation import subsets
from cast.evaluation.predictions import Predictions
from cast.metrics import (
    ClassF1,
    action_accuracy,
    class_f1,
    confusion_matrix,
    confusion_pairs,
    harmonic_mean,
    mean_class_accuracy,
    paired_accuracy,
    paired_hits,
    top_k_accuracy,
    wilson_interval,
)

#: The meaning of each name in `metrics`, without the head's name.
_OF_A_HEAD = {
    "top1": "share of videos whose best guess is right",
    "top5": "share of videos whose class is among the five best guesses",
    "mean_class_accuracy": "mean over classes of the share of their videos with a right guess",
    "f1_macro": "mean F1 over classes",
    "f1_weighted": "mean F1 over classes, weighted by their videos",
    "single_view_top1": "top1 of one clip alone, mean over the protocol's clips",
}
#: The meaning of the names that only a compositional model has.
_OF_PAIRS = {
    "action_top1": "verb and noun both right, the published pairing: argmax of the verbs with argmax of the nouns",
    "action_top5_joint": "the (verb, noun) pair is among the five most probable pairs, by the product",
    "action_top5_paired": "verb among the five best verbs and noun among the five best nouns, as the published code "
    "counts them; never below the joint figure",
    "action_mean_class_accuracy": "mean over the actions that occur of the share of their videos with a right guess",
    "harmonic_mean": "harmonic mean of verb_top1 and noun_top1",
}


def metrics(predictions: Predictions) -> dict[str, float]:
    """Every figure of one model. A compositional model's names begin with `verb_`, `noun_` or `action_`.

    Heads with fewer than five classes have no top-5 figures.

    Raises:
        ValueError: the predictions have no labels.
    """
    if not predictions.labels:
        raise ValueError("these predictions have no labels, so there is nothing to measure")
    figures: dict[str, float] = {}
    for head in ordered(predictions.probabilities):
        figures |= {f"{head}_{name}": value for name, value in _head(predictions, head).items()}
    if predictions.compositional:
        figures |= _actions(predictions)
    for name, videos in _subsets(predictions).items():
        figures[f"{name}_top1"] = 100 * float(videos.double().mean())
    return figures


def meanings(predictions: Predictions) -> dict[str, str]:
    """The meaning of each figure of :func:`metrics`, by its name, or by its name's end if every head has one."""
    figures = metrics(predictions)
    of_pairs = {name: meaning for name, meaning in _OF_PAIRS.items() if predictions.compositional and name in figures}
    of_heads = figures.keys() - of_pairs.keys()
    return {name: text for name, text in _OF_A_HEAD.items() if any(n.endswith(f"_{name}") for n in of_heads)} | (
        of_pairs | subsets.meanings(predictions.subsets)
    )


def ordered(heads: Mapping[str, Any]) -> list[str]:
    """Verb before noun, as in speech."""
    return sorted(heads, reverse=True)


def matrix(predictions: Predictions, head: str) -> Tensor:
    """Confusion matrix of a head, int64 [classes, classes]."""
    classes = predictions.probabilities[head].shape[1]
    return confusion_matrix(predictions.guesses(head), predictions.labels[head], classes)


def head_f1(predictions: Predictions, head: str) -> ClassF1:
    """Class-wise F1 of a head."""
    return class_f1(matrix(predictions, head))


def _head(predictions: Predictions, head: str) -> dict[str, float]:
    scores, labels, counts = predictions.probabilities[head], predictions.labels[head], matrix(predictions, head)
    figures = {"top1": top_k_accuracy(scores, labels)}
    if scores.shape[1] >= 5:
        figures["top5"] = top_k_accuracy(scores, labels, 5)
    f1 = class_f1(counts)
    figures |= {"mean_class_accuracy": mean_class_accuracy(counts), "f1_macro": f1.macro, "f1_weighted": f1.weighted}
    if head in predictions.views:
        hits = predictions.views[head] == labels[:, None]
        figures["single_view_top1"] = 100 * float(hits.double().mean())
    return figures


def _actions(predictions: Predictions) -> dict[str, float]:
    scores = predictions.probabilities["verb"], predictions.probabilities["noun"]
    labels = predictions.labels["verb"], predictions.labels["noun"]
    figures = {"action_top1": action_accuracy(*scores, *labels)}
    if min(values.shape[1] for values in scores) >= 5:
        figures["action_top5_joint"] = action_accuracy(*scores, *labels, k=5)
        figures["action_top5_paired"] = paired_accuracy(*scores, *labels, k=5)
    pairs = torch.stack(labels, 1)
    occurring, which = pairs.unique(dim=0, return_inverse=True)
    hits = torch.zeros(len(occurring), dtype=torch.float64).index_add_(0, which, predictions.hits("action").double())
    figures["action_mean_class_accuracy"] = 100 * float((hits / torch.bincount(which)).mean())
    tops = [top_k_accuracy(score, label) for score, label in zip(scores, labels, strict=True)]
    return figures | {"harmonic_mean": harmonic_mean(*tops)}


def tasks(predictions: Predictions) -> list[str]:
    """The tasks with a right or wrong answer: the heads, and the action of a compositional model."""
    return [*ordered(predictions.probabilities), *(["action"] if predictions.compositional else [])]


def intervals(predictions: Predictions) -> dict[str, tuple[float, float]]:
    """95 % confidence intervals of the top-1 figures, by task, and by subset and task."""
    hits = {task: predictions.hits(task) for task in tasks(predictions)} | _subsets(predictions)
    return {name: wilson_interval(int(right.sum()), len(right)) for name, right in hits.items()}


def _subsets(predictions: Predictions) -> dict[str, Tensor]:
    """Which samples of a subset are right, bool [its samples]. The subset's name ends with the task."""
    named = {name: name.rpartition("_")[2] for name in predictions.subsets}
    known = tasks(predictions)
    return {name: predictions.hits(task)[predictions.subsets[name]] for name, task in named.items() if task in known}


def against(predictions: Predictions, baseline: Predictions) -> dict[str, Any]:
    """The gains of `predictions` over a baseline on the same videos.

    Returns:
        `gain`: percentage points of every figure that both have; `f1_gain`: by head, the mean over classes of the
        difference
            of F1, and the numbers of classes that gained and lost; `paired`: by task, videos won and lost.
    """
    ours, theirs = metrics(predictions), metrics(baseline)
    result: dict[str, Any] = {
        "gain": {name: ours[name] - theirs[name] for name in ours if name in theirs},
        "f1_gain": {},
        "paired": {},
    }
    for head in ordered(predictions.probabilities):
        if head in baseline.probabilities:
            gains = f1_gains(predictions, baseline, head)
            result["f1_gain"][head] = {
                "mean": float(gains.nanmean()),
                "classes_better": int((gains > 0).sum()),
                "classes_worse": int((gains < 0).sum()),
            }
    for task in tasks(predictions):
        if task in tasks(baseline):
            result["paired"][task] = asdict(paired_hits(predictions.hits(task), baseline.hits(task)))
    return result


def f1_gains(predictions: Predictions, baseline: Predictions, head: str) -> Tensor:
    """float64 [classes]: F1 minus the baseline's F1 in points; NaN for classes without samples."""
    ours, theirs = head_f1(predictions, head), head_f1(baseline, head)
    gains = ours.f1 - theirs.f1
    return gains.masked_fill(ours.support == 0, torch.nan)


def summarise(predictions: Predictions, baselines: Mapping[str, Predictions]) -> dict[str, Any]:
    """The content of `metrics.json`; without labels a note. `baselines` by name, in the order of `predictions`."""
    summary: dict[str, Any] = {"about": dict(predictions.about), "videos": len(predictions.videos)}
    if not predictions.labels:
        return summary | {"note": "the data set has no labels, so nothing was measured"}
    summary |= {
        "metrics": metrics(predictions),
        "meanings": meanings(predictions),
        "confidence_95": intervals(predictions),
        "classes": {head: _classes(predictions, baselines, head) for head in ordered(predictions.probabilities)},
        "confusions": {head: _confusions(predictions, head) for head in ordered(predictions.probabilities)},
        "baselines": {
            name: {"about": dict(baseline.about), "metrics": metrics(baseline), **against(predictions, baseline)}
            for name, baseline in baselines.items()
        },
    }
    return summary


def _classes(predictions: Predictions, baselines: Mapping[str, Predictions], head: str) -> list[dict[str, Any]]:
    f1 = head_f1(predictions, head)
    gains = {n: f1_gains(predictions, b, head) for n, b in baselines.items() if head in b.probabilities}
    return [
        {
            "name": name,
            "videos": int(f1.support[index]),
            "f1": _number(f1.f1[index]),
            "precision": _number(f1.precision[index]),
            "recall": _number(f1.recall[index]),
            "f1_gain": {baseline: _number(values[index]) for baseline, values in gains.items()},
        }
        for index, name in enumerate(predictions.classes[head])
    ]


def _number(value: Tensor) -> float | None:
    """The value, or None for NaN, which JSON does not have."""
    return None if value.isnan() else float(value)


def _confusions(predictions: Predictions, head: str) -> list[dict[str, Any]]:
    names = predictions.classes[head]
    return [
        {"truth": names[pair.truth], "guess": names[pair.guess], "count": pair.count, "share": pair.share}
        for pair in confusion_pairs(matrix(predictions, head), 20)
    ]
