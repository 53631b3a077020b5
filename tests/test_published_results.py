"""Merging of views and the organisers' scores beside what the published functions answered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from published import published

from cast.evaluation.predictions import Predictions
from cast.evaluation.subsets import TAIL, UNSEEN, read_subsets
from cast.evaluation.summary import metrics
from cast.metrics import average_views, top_pairs
from cast.video.annotations import Sample


@pytest.mark.parametrize("name", ["ek100", "ssv2", "k400"])
def test_merged_views(name: str) -> None:
    theirs = published()["merge"][name]
    heads = {"verb": "verb_", "noun": "noun_"} if name == "ek100" else {"action": ""}
    logits = {head: torch.tensor(theirs[f"{key}logits"], dtype=torch.float64) for head, key in heads.items()}
    labels = {head: torch.tensor(theirs[f"{key}labels"]) for head, key in heads.items()}
    assert {values.shape[1] for values in logits.values()} == {theirs["views"] * theirs["crops"]}
    probabilities = {head: average_views(values) for head, values in logits.items()}
    assert {head: values.argmax(1).tolist() for head, values in probabilities.items()} == {
        head: theirs[f"{key}guess"] for head, key in heads.items()
    }
    classes = {head: [""] * values.shape[1] for head, values in probabilities.items()}
    videos = [str(number) for number in range(len(labels[next(iter(heads))]))]
    figures = metrics(Predictions(videos, probabilities, labels, {}, classes))
    renamed = {"action_top5": "action_top5_paired", "top1": "action_top1", "top5": "action_top5"}
    for key, value in theirs["percent"].items():
        wanted = key if name == "ek100" and key != "action_top5" else renamed[key]
        assert figures[wanted] == pytest.approx(value, abs=1e-10), key


def test_views_are_averaged_in_float64() -> None:
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.1, 0.2]]])
    average = average_views(logits)
    assert average.dtype == torch.float64
    assert torch.equal(average, logits.double().softmax(-1).mean(-2))
    assert torch.equal(average_views(logits.bfloat16()), average_views(logits.bfloat16().double()))


def test_organisers_scores(tmp_path: Path) -> None:
    theirs = published()["organisers"]
    probabilities = {
        head: torch.tensor(theirs[f"{head}_scores"], dtype=torch.float64).softmax(-1) for head in ("verb", "noun")
    }
    labels = {head: torch.tensor(theirs[f"{head}_labels"]) for head in ("verb", "noun")}
    pairs = top_pairs(probabilities["verb"], probabilities["noun"], 5)[1]
    assert pairs.tolist() == theirs["best_pairs"]

    rows = {"participant_id": theirs["unseen_participants"], "verb": theirs["tail_verbs"], "noun": theirs["tail_nouns"]}
    for column, name in (("participant_id", UNSEEN["val"]), *TAIL.items()):
        (tmp_path / name).write_text("\n".join(map(str, [column, *rows[column]])) + "\n")
    names, numbers = theirs["narration_ids"], range(len(theirs["narration_ids"]))
    samples = [Sample(Path(f"{names[n]}.mp4"), {head: int(labels[head][n]) for head in labels}) for n in numbers]
    counts = {head: values.shape[1] for head, values in probabilities.items()}
    subsets = read_subsets(tmp_path, "val", samples, counts)
    classes = {head: [""] * count for head, count in counts.items()}
    figures = metrics(Predictions(names, probabilities, labels, {}, classes, subsets=subsets))
    for key, value in theirs["percent"].items():
        subset, task, k = re.fullmatch(r"(all|tail|unseen)_(\w+)_accuracy_at_([15])", key).groups()
        ours = f"{task}_top{k}{'_joint' if task == 'action' and k == '5' else ''}"
        assert figures[ours if subset == "all" else f"{subset}_{ours}"] == pytest.approx(value, abs=1e-10), key
