"""Class-wise figures, comparisons and intervals against scikit-learn, SciPy and cases done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cast.metrics import (
    Confusion,
    action_accuracy,
    class_f1,
    confusion_matrix,
    confusion_pairs,
    mean_class_accuracy,
    paired_accuracy,
    paired_hits,
    wilson_interval,
)

CLASSES = 9


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Guesses and labels of 80 samples; class 8 never occurs and is never guessed, class 7 is only guessed."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(7, (80,), generator=generator)
    guesses = torch.where(
        torch.rand(80, generator=generator) < 0.5, labels, torch.randint(8, (80,), generator=generator)
    )
    guesses[0] = 7
    return guesses, labels


def test_f1_and_confusions_agree_with_scikit_learn(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    guesses, labels = drawn
    matrix = confusion_matrix(guesses, labels, CLASSES)
    expected = sklearn_metrics.confusion_matrix(labels, guesses, labels=np.arange(CLASSES))
    assert matrix.tolist() == expected.tolist()
    figures = class_f1(matrix)
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        labels, guesses, labels=np.arange(CLASSES), zero_division=np.nan
    )
    np.testing.assert_allclose(figures.precision, 100 * precision)
    np.testing.assert_allclose(figures.recall, 100 * recall)
    np.testing.assert_allclose(figures.f1, 100 * f1)
    assert figures.support.tolist() == support.tolist()
    weighted = sklearn_metrics.f1_score(labels, guesses, average="weighted")
    assert figures.weighted == pytest.approx(100 * weighted)
    occurring = sklearn_metrics.f1_score(labels, guesses, average="macro", labels=np.arange(8))
    assert figures.macro == pytest.approx(100 * occurring)
    balanced = sklearn_metrics.balanced_accuracy_score(labels[labels < 7], guesses[labels < 7])
    assert mean_class_accuracy(matrix) == pytest.approx(100 * balanced)


def test_f1_by_hand() -> None:
    # Truth 0 0 0 1 1 2, guess 0 0 1 1 0 2.
    matrix = confusion_matrix(torch.tensor([0, 0, 1, 1, 0, 2]), torch.tensor([0, 0, 0, 1, 1, 2]), 4)
    figures = class_f1(matrix)
    assert figures.f1[:3].tolist() == pytest.approx([200 / 3, 50, 100])
    assert math.isnan(figures.f1[3])
    assert figures.macro == pytest.approx((200 / 3 + 50 + 100) / 3)
    assert figures.weighted == pytest.approx((3 * 200 / 3 + 2 * 50 + 100) / 6)
    assert mean_class_accuracy(matrix) == pytest.approx((200 / 3 + 50 + 100) / 3)
    assert confusion_pairs(matrix) == [Confusion(1, 0, 1, 50.0), Confusion(0, 1, 1, pytest.approx(100 / 3))]
    assert confusion_pairs(matrix, 1) == [Confusion(1, 0, 1, 50.0)]


def test_a_confusions_share_is_of_the_true_class() -> None:
    # 8 samples of class 0 and 2 of class 1; guessed 5 times each.
    matrix = torch.tensor([[4, 4], [1, 1]])
    assert confusion_pairs(matrix) == [Confusion(0, 1, 4, 50.0), Confusion(1, 0, 1, 50.0)]


def test_impossible_guesses_are_refused() -> None:
    with pytest.raises(ValueError, match="guesses must be integers from 0 to 2"):
        confusion_matrix(torch.tensor([3]), torch.tensor([0]), 3)
    with pytest.raises(ValueError, match="labels must be integers from 0 to 2"):
        confusion_matrix(torch.tensor([0]), torch.tensor([-1]), 3)
    with pytest.raises(ValueError, match="2 guesses for 1 labels"):
        confusion_matrix(torch.tensor([0, 1]), torch.tensor([0]), 3)
    with pytest.raises(ValueError, match="at least one sample"):
        confusion_matrix(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long), 3)


def test_paired_and_joint_actions_by_hand() -> None:
    """The right pair is the fifth of all pairs by product, but each part is second best."""
    verb = torch.tensor([[0.6, 0.3, 0.1]])
    noun = torch.tensor([[0.7, 0.2, 0.1]])
    # Products: .42 (0,0), .21 (1,0), .12 (0,1), .07 (2,0), .06 (1,1) and (0,2), ...
    labels = torch.tensor([1]), torch.tensor([1])
    assert [action_accuracy(verb, noun, *labels, k=k) for k in (1, 2, 4, 6)] == [0, 0, 0, 100]
    assert [paired_accuracy(verb, noun, *labels, k=k) for k in (1, 2)] == [0, 100]
    with pytest.raises(ValueError, match="k is 4; it must be from 1 to 3"):
        paired_accuracy(verb, noun, *labels, k=4)


def test_pairing_agrees_with_the_definition_on_random_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    verb, noun = (torch.rand(50, classes, generator=generator) for classes in (7, 11))
    verbs, nouns = (torch.randint(classes, (50,), generator=generator) for classes in (7, 11))
    for k in (1, 3, 5):
        right = [
            v in np.argsort(-verb[row].numpy())[:k] and n in np.argsort(-noun[row].numpy())[:k]
            for row, (v, n) in enumerate(zip(verbs.tolist(), nouns.tolist(), strict=True))
        ]
        assert paired_accuracy(verb, noun, verbs, nouns, k) == pytest.approx(100 * np.mean(right))
        assert paired_accuracy(verb, noun, verbs, nouns, k) >= action_accuracy(verb, noun, verbs, nouns, k)
    assert paired_accuracy(verb, noun, verbs, nouns) == action_accuracy(verb, noun, verbs, nouns)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 5), (9, 1), (3, 17), (1200, 900)])
def test_mcnemar_is_a_binomial_test(won: int, lost: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    ours = torch.tensor([True] * won + [False] * lost + [True, False])
    theirs = torch.tensor([False] * won + [True] * lost + [True, False])
    found = paired_hits(ours, theirs)
    assert (found.won, found.lost) == (won, lost)
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (7, 10), (10, 10), (4930, 9668)])
def test_intervals_are_wilsons(hits: int, total: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(hits, total).proportion_ci(method="wilson")
    assert wilson_interval(hits, total) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="2 samples cannot be compared with 3"):
        paired_hits(torch.ones(2, dtype=torch.bool), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="0 hits of 0 samples"):
        wilson_interval(0, 0)
