"""Figures by class: F1, recall, and the confusions between classes.

All figures are in percent. A class without samples and without guesses has no F1 and no recall. They are NaN here and
omitted from every mean, so that a rare class missing from a test set doesn't count as a failure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cast.metrics.accuracy import check_labels


@dataclass(frozen=True)
class ClassF1:
    """Per-class figures, float64 [classes] in percent; `support` int64 [classes] counts the class's samples.

    `precision` is NaN for a class that was never guessed, `recall` for one without samples, `f1` for one with neither.
    """

    precision: Tensor
    recall: Tensor
    f1: Tensor
    support: Tensor

    @property
    def macro(self) -> float:
        """Mean F1 over the classes that have one."""
        return float(self.f1.nanmean())

    @property
    def weighted(self) -> float:
        """Mean F1 weighted by each class's samples: the weighted-average F1 of the paper's figure 5."""
        present = self.support > 0
        return float((self.f1[present] * self.support[present]).sum() / self.support.sum())


@dataclass(frozen=True)
class Confusion:
    """Of class `truth`, `count` samples were taken for class `guess`: `share` percent of that class's samples."""

    truth: int
    guess: int
    count: int
    share: float


def confusion_matrix(guesses: Tensor, labels: Tensor, classes: int) -> Tensor:
    """int64 [classes, classes]: row is the truth, column the guess.

    Args:
        guesses: [samples], integers from 0 to classes - 1.
        labels: [samples], likewise.
        classes: number of classes.

    Raises:
        ValueError: no samples, other shapes, or an index outside its range.
    """
    check_labels("labels", labels, classes)
    check_labels("guesses", guesses, classes)
    if guesses.shape != labels.shape:
        raise ValueError(f"there are {len(guesses)} guesses for {len(labels)} labels; they must be the same number")
    cells = labels.long() * classes + guesses.long()
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes)


def class_f1(matrix: Tensor) -> ClassF1:
    """Precision, recall and F1 of every class from a confusion matrix [classes, classes]."""
    counts = matrix.double()
    right, truths, guesses = counts.diagonal(), counts.sum(1), counts.sum(0)
    # 0 / 0 is NaN, which means "no figure".
    return ClassF1(
        precision=100 * right / guesses,
        recall=100 * right / truths,
        f1=100 * 2 * right / (truths + guesses),
        support=matrix.sum(1),
    )


def mean_class_accuracy(matrix: Tensor) -> float:
    """Mean recall over the classes with samples."""
    return float(class_f1(matrix).recall.nanmean())


def confusion_pairs(matrix: Tensor, count: int = 10) -> list[Confusion]:
    """The `count` most frequent mistakes, by number of samples, then by share; fewer if there are fewer."""
    wrong = matrix.clone()
    wrong.fill_diagonal_(0)
    support = matrix.sum(1)
    cells = [
        Confusion(truth, guess, int(wrong[truth, guess]), 100 * float(wrong[truth, guess]) / float(support[truth]))
        for truth, guess in wrong.nonzero().tolist()
    ]
    return sorted(cells, key=lambda cell: (-cell.count, -cell.share, cell.truth, cell.guess))[:count]
