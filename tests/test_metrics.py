"""Accuracies against scikit-learn and against brute force over all pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cast.metrics import (
    action_accuracy,
    average_views,
    compositional_metrics,
    harmonic_mean,
    top_k_accuracy,
    top_pairs,
)

SAMPLES, VERBS, NOUNS = 60, 7, 11


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = {"verb": torch.randn(SAMPLES, VERBS, generator=generator).softmax(-1)}
    draw["noun"] = torch.randn(SAMPLES, NOUNS, generator=generator).softmax(-1)
    draw["verb_labels"] = torch.randint(VERBS, (SAMPLES,), generator=generator)
    draw["noun_labels"] = torch.randint(NOUNS, (SAMPLES,), generator=generator)
    return draw


@pytest.mark.parametrize("k", [1, 2, 5, NOUNS - 1])
def test_top_k_agrees_with_scikit_learn(batch: dict[str, torch.Tensor], k: int) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    expected = 100 * sklearn_metrics.top_k_accuracy_score(
        batch["noun_labels"].numpy(), batch["noun"].numpy(), k=k, labels=np.arange(NOUNS)
    )
    assert top_k_accuracy(batch["noun"], batch["noun_labels"], k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 5, 20, VERBS * NOUNS])
def test_actions_are_ranked_over_all_pairs(batch: dict[str, torch.Tensor], k: int) -> None:
    hits = 0
    for verb, noun, verb_label, noun_label in zip(*batch.values(), strict=True):
        pairs = sorted(itertools.product(range(VERBS), range(NOUNS)), key=lambda p: -(verb[p[0]] * noun[p[1]]).item())
        hits += (int(verb_label), int(noun_label)) in pairs[:k]
    assert action_accuracy(*batch.values(), k=k) == pytest.approx(100 * hits / SAMPLES)


def test_best_action_is_the_published_pair_of_best_guesses(batch: dict[str, torch.Tensor]) -> None:
    verb_right = batch["verb"].argmax(1) == batch["verb_labels"]
    noun_right = batch["noun"].argmax(1) == batch["noun_labels"]
    expected = 100 * (verb_right & noun_right).double().mean().item()
    assert action_accuracy(*batch.values()) == pytest.approx(expected)


def test_top_pairs_give_descending_joint_probabilities(batch: dict[str, torch.Tensor]) -> None:
    values, pairs = top_pairs(batch["verb"], batch["noun"], 9)
    rows = torch.arange(SAMPLES)[:, None]
    assert torch.equal(values, batch["verb"][rows, pairs[..., 0]] * batch["noun"][rows, pairs[..., 1]])
    assert (values.diff(dim=1) <= 0).all()


def test_of_equal_scores_the_lower_class_comes_first() -> None:
    """As argmax has it: accuracy, F1 and every comparison speak of the same guesses, whatever ties."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 3, (300, 40), generator=generator).float()
    labels = torch.randint(0, 40, (300,), generator=generator)
    best = coarse.argmax(1)
    assert top_k_accuracy(coarse, labels) == 100 * (best == labels).double().mean().item()
    for k in (1, 2, 5, 100):
        values, pairs = top_pairs(coarse, coarse.flip(1), k)
        # Every pair, a better verb before a worse one where the products are equal.
        for row in range(0, 300, 37):
            verbs = sorted(range(40), key=lambda v: (-coarse[row, v].item(), v))
            nouns = sorted(range(40), key=lambda n: (-coarse[row, 39 - n].item(), n))
            every = [(v, n) for v in verbs for n in nouns]
            every.sort(key=lambda pair: -coarse[row, pair[0]].item() * coarse[row, 39 - pair[1]].item())
            assert [tuple(pair) for pair in pairs[row].tolist()] == every[:k]
            assert values[row].tolist() == [coarse[row, v].item() * coarse[row, 39 - n].item() for v, n in every[:k]]


def test_views_are_averaged_after_softmax() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, 100.0]]])
    torch.testing.assert_close(average_views(logits), torch.tensor([[0.25, 0.75]], dtype=torch.float64))


def test_harmonic_means_of_the_paper() -> None:
    assert harmonic_mean(72.5, 60.9, 71.6, 85.3) == pytest.approx(71.55, abs=0.005)
    assert harmonic_mean(71.6, 85.3) == pytest.approx(77.85, abs=0.005)
    assert harmonic_mean(50.0, 0.0) == 0.0


def test_compositional_metrics() -> None:
    eye = torch.eye(4)
    metrics = compositional_metrics(
        {"verb": eye, "noun": eye},
        {"verb": torch.tensor([0, 1, 2, 0]), "noun": torch.tensor([0, 1, 3, 0])},
    )
    assert metrics == pytest.approx({"verb": 75.0, "noun": 50.0, "action": 50.0, "harmonic_mean": 60.0})


@pytest.mark.parametrize(
    ("scores", "labels", "k", "message"),
    [
        (torch.zeros(3, 4), torch.tensor([0, 1]), 1, r"\[3, 4\] and its labels \[2\]"),
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 1, "at least one sample"),
        (torch.zeros(2, 4), torch.tensor([0, 4]), 1, "integers from 0 to 3"),
        (torch.zeros(2, 4), torch.tensor([0.0, 1.0]), 1, "integers from 0 to 3"),
        (torch.zeros(2, 4), torch.tensor([0, 1]), 5, "k is 5; it must be from 1 to 4"),
        (torch.tensor([[0.0, float("nan")]]), torch.tensor([1]), 1, "contains NaN"),
    ],
)
def test_impossible_scores_are_refused(scores: torch.Tensor, labels: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k_accuracy(scores, labels, k)


def test_impossible_pairs_are_refused(batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="k is 78; it must be from 1 to 77"):
        action_accuracy(*batch.values(), k=78)
    with pytest.raises(ValueError, match="verb has 60 samples and noun 59"):
        action_accuracy(batch["verb"], batch["noun"][1:], batch["verb_labels"], batch["noun_labels"][1:])
    with pytest.raises(ValueError, match="takes one or more values"):
        harmonic_mean()
