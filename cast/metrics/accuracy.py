"""Accuracies in percent, and the published test protocol's average over views.

A compositional model has two kinds of action accuracy. They agree for k = 1: verb and noun must both be right.

- joint (`action_accuracy`): all (verb, noun) pairs are ranked by the product of their probabilities, and the right
  pair is among the `k` best. EPIC-Kitchens-100's own scoring does this.
- paired (`paired_accuracy`): the right verb is among the `k` best verbs and the right noun among the `k` best nouns,
  as in the published code's "top-5 action". It is never lower, because `k * k` pairs count.

Of equal scores the class with the lower index comes first, as in `argmax`: so every figure uses the same guesses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def average_views(logits: Tensor) -> Tensor:
    """Logits `[..., views, classes]` -> probabilities `[..., classes]`: softmax of each view, then the mean.

    In float64 as in the published code, and so on the CPU: not every device has float64.
    """
    return logits.cpu().double().softmax(-1).mean(-2)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Percentage of samples whose label is among their `k` best scores.

    Args:
        scores: [samples, classes], logits or probabilities, no NaN.
        labels: [samples], integers from 0 to classes - 1.
        k: number of guesses that count, 1 to classes.

    Raises:
        ValueError: shapes, labels or k that do not fit, no samples, or NaN among the scores.
    """
    _check("scores", scores, labels, k)
    return _percent(_hits(scores, labels, k))


def action_accuracy(verb: Tensor, noun: Tensor, verb_labels: Tensor, noun_labels: Tensor, k: int = 1) -> float:
    """Percentage of samples whose (verb, noun) pair is among the `k` most probable pairs.

    Args:
        verb: [samples, verbs], probabilities.
        noun: [samples, nouns], probabilities.
        verb_labels: [samples], integers.
        noun_labels: [samples], integers.
        k: number of pairs that count.

    Raises:
        ValueError: shapes, labels or k that do not fit, no samples, or NaN among the probabilities.
    """
    _check("verb", verb, verb_labels, 1)
    _check("noun", noun, noun_labels, 1)
    if len(verb) != len(noun):
        raise ValueError(f"verb has {len(verb)} samples and noun {len(noun)}; they must be the same")
    pairs = top_pairs(verb, noun, k)[1]
    hits = (pairs[..., 0] == verb_labels[:, None]) & (pairs[..., 1] == noun_labels[:, None])
    return _percent(hits)


def paired_accuracy(verb: Tensor, noun: Tensor, verb_labels: Tensor, noun_labels: Tensor, k: int = 1) -> float:
    """Percentage of samples whose verb is among the `k` best verbs and whose noun is among the `k` best nouns.

    The published code's action accuracy. Arguments and errors as in :func:`action_accuracy`, but `k` is at most the
    smaller of the two numbers of classes.
    """
    _check("verb", verb, verb_labels, k)
    _check("noun", noun, noun_labels, k)
    if len(verb) != len(noun):
        raise ValueError(f"verb has {len(verb)} samples and noun {len(noun)}; they must be the same")
    hits = _hits(verb, verb_labels, k).any(1) & _hits(noun, noun_labels, k).any(1)
    return _percent(hits[:, None])


def top_classes(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best scores of each row [samples, classes] and their classes, [samples, k] each, best first."""
    values, indices = scores.sort(dim=1, descending=True, stable=True)  # topk does not fix the order of equal scores
    return values[:, :k], indices[:, :k]


def top_pairs(verb: Tensor, noun: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` most probable (verb, noun) pairs under independence.

    Args:
        verb: [samples, verbs], probabilities.
        noun: [samples, nouns], probabilities.
        k: number of pairs, 1 to verbs * nouns.

    Returns:
        Probabilities `[samples, k]`, descending, and indices `[samples, k, 2]`. The first pair is always the best verb
        with
            the best noun.

    Raises:
        ValueError: `k` is outside its range.
    """
    if not 1 <= k <= verb.shape[1] * noun.shape[1]:
        raise ValueError(f"k is {k}; it must be from 1 to {verb.shape[1] * noun.shape[1]}, the number of pairs")
    (p_verb, verbs), (p_noun, nouns) = (
        top_classes(verb, min(k, verb.shape[1])),
        top_classes(noun, min(k, noun.shape[1])),
    )
    # The pair of the i-th best verb and the j-th best noun follows i * j - 1 pairs that are at least as probable.
    ranks = torch.outer(torch.arange(1, p_verb.shape[1] + 1), torch.arange(1, p_noun.shape[1] + 1))
    row, column = (places.to(verb.device) for places in (ranks <= k).nonzero(as_tuple=True))
    values, order = top_classes(p_verb[:, row] * p_noun[:, column], k)
    return values, torch.stack([verbs.gather(1, row[order]), nouns.gather(1, column[order])], dim=-1)


def harmonic_mean(*percentages: float) -> float:
    """Harmonic mean, 0 if any value is 0.

    Raises:
        ValueError: no value, or a negative one.
    """
    if not percentages or min(percentages) < 0:
        raise ValueError(f"the harmonic mean takes one or more values of at least 0, got {percentages}")
    return 0.0 if 0 in percentages else len(percentages) / sum(1 / value for value in percentages)


def compositional_metrics(probabilities: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, float]:
    """`verb`, `noun` and `action` top-1 accuracy in percent, and the `harmonic_mean` of verb and noun.

    Args:
        probabilities: `verb` [samples, verbs] and `noun` [samples, nouns].
        labels: `verb` and `noun`, [samples] each.
    """
    verb = top_k_accuracy(probabilities["verb"], labels["verb"])
    noun = top_k_accuracy(probabilities["noun"], labels["noun"])
    action = action_accuracy(probabilities["verb"], probabilities["noun"], labels["verb"], labels["noun"])
    return {"verb": verb, "noun": noun, "action": action, "harmonic_mean": harmonic_mean(verb, noun)}


def _hits(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    return top_classes(scores, k)[1] == labels[:, None]


def _percent(hits: Tensor) -> float:
    return 100 * hits.any(1).double().mean().item()


def check_labels(name: str, labels: Tensor, classes: int) -> None:
    """Raise ValueError unless `labels` is a non-empty [samples] of integers from 0 to classes - 1."""
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"{name} is {list(labels.shape)}; it must be [samples] with at least one sample")
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{name} must be integers from 0 to {classes - 1}")


def _check(name: str, scores: Tensor, labels: Tensor, k: int) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(scores):
        raise ValueError(
            f"{name} is {list(scores.shape)} and its labels {list(labels.shape)}; "
            "they must be [samples, classes] and [samples] with at least one sample"
        )
    classes = scores.shape[1]
    check_labels(f"labels of {name}", labels, classes)
    if not 1 <= k <= classes:
        raise ValueError(f"k is {k}; it must be from 1 to {classes}, the number of classes")
    if scores.isnan().any():
        raise ValueError(f"{name} contains NaN: the model that made it has diverged")
