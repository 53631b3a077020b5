"""Prediction files and EPIC-Kitchens-100's submission."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from evaluation_cases import predictions

from cast.evaluation import Predictions, read_predictions, write_predictions, write_submission
from cast.evaluation.parts import Parts
from cast.ground.optional import MissingExtraError


def _same(one: Predictions, other: Predictions) -> bool:
    tensors = [
        (a, b) for kind in ("probabilities", "labels", "views") for a, b in [(getattr(one, kind), getattr(other, kind))]
    ]
    return (
        list(one.videos) == list(other.videos)
        and one.classes == other.classes
        and dict(one.about) == dict(other.about)
        and all(
            a.keys() == b.keys() and all(torch.equal(a[h], b[h]) and a[h].dtype == b[h].dtype for h in a)
            for a, b in tensors
        )
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("labelled", [True, False])
def test_files_keep_every_bit(suffix: str, labelled: bool, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    made = predictions()
    made.probabilities["verb"][0, :3] = torch.tensor([1e-38, 1 / 3, torch.finfo(torch.float32).smallest_normal])
    if not labelled:
        made = Predictions(made.videos, made.probabilities, {}, made.views, made.classes, made.about)
    write_predictions(tmp_path / f"out{suffix}", made)
    assert _same(read_predictions(tmp_path / f"out{suffix}"), made)
    assert [path.name for path in tmp_path.iterdir()] == [f"out{suffix}"]


def test_a_line_is_a_sample(tmp_path: Path) -> None:
    """As documented, for whoever reads the file without us."""
    made = predictions(samples=3)
    write_predictions(tmp_path / "out.jsonl", made)
    header, *lines = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert header == {"format": "cast-predictions", "about": made.about, "classes": made.classes}
    assert [line["video"] for line in lines] == made.videos
    assert lines[1]["labels"] == {"verb": int(made.labels["verb"][1]), "noun": int(made.labels["noun"][1])}
    np.testing.assert_array_equal(np.float32(lines[2]["probabilities"]["noun"]), made.probabilities["noun"][2].numpy())


def test_parquet_is_read_by_pyarrow(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    made = predictions(samples=3)
    write_predictions(tmp_path / "out.parquet", made)
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert rows[2]["video"] == "P01_2.mp4"
    assert rows[2]["label_noun"] == int(made.labels["noun"][2])
    np.testing.assert_array_equal(np.float32(rows[2]["probability_verb"]), made.probabilities["verb"][2].numpy())


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cast-kernels\[parquet\]'"):
        write_predictions(tmp_path / "out.parquet", predictions())


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such predictions file; give a \.jsonl"):
        read_predictions(tmp_path / "out.jsonl")
    for content in ("", "{}\n", "[1, 2]\n", '{"format": "cast-predictions"', "\0"):
        (tmp_path / "out.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"predictions file"):
            read_predictions(tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"go into \.jsonl or \.parquet files, not '\.csv'"):
        write_predictions(tmp_path / "out.csv", predictions())
    if pytest.importorskip("pyarrow"):
        (tmp_path / "out.parquet").write_text("no")
        with pytest.raises(ValueError, match="damaged one"):
            read_predictions(tmp_path / "out.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, line: header.pop("classes"), "'classes' is missing"),
        (lambda header, line: header["classes"].pop("noun"), "class names for .'verb'"),
        (lambda header, line: line.pop("probabilities"), "'probabilities' is missing"),
        (lambda header, line: line["labels"].pop("noun"), "'noun' is missing"),
        (lambda header, line: line.update(probabilities=3), "damaged one"),
    ],
)
def test_files_with_missing_fields_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    write_predictions(tmp_path / "out.jsonl", predictions(samples=3))
    header, *lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    change(header, lines[-1])
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    with pytest.raises(ValueError, match=f"out.jsonl: is no predictions file.*{message}"):
        read_predictions(tmp_path / "out.jsonl")


def test_names_may_hold_what_unicode_calls_a_line_separator(tmp_path: Path) -> None:
    made = predictions(samples=1, names={"verb": ["a\u2028b", *"cdefg"], "noun": [*"abcde"]})
    named = replace(made, videos=["x\x85.mp4"])
    write_predictions(tmp_path / "out.jsonl", named)
    assert _same(read_predictions(tmp_path / "out.jsonl"), named)
    parts = Parts(tmp_path / "parts", {}, 0)
    parts.append([{"video": "x\x85.mp4"}])
    assert list(parts.load()) == ["x\x85.mp4"]


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    write_predictions(tmp_path / "out.jsonl", predictions())
    text = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="damaged one"):
        read_predictions(tmp_path / "out.jsonl")


def test_baselines_are_put_into_the_same_order() -> None:
    ours, other = predictions(0), predictions(1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = Predictions(
        [other.videos[index] for index in order],
        {head: values[order] for head, values in other.probabilities.items()},
        {head: values[order] for head, values in other.labels.items()},
        {head: values[order] for head, values in other.views.items()},
        other.classes,
        other.about,
    )
    assert _same(shuffled.aligned_to(ours, "it"), other)
    fewer = predictions(1, samples=39)
    with pytest.raises(ValueError, match=r"it was not made on the same videos: it lacks 1 \(P01_39\.mp4\)"):
        fewer.aligned_to(ours, "it")
    with pytest.raises(ValueError, match="it was made without labels"):
        replace(other, labels={}).aligned_to(ours, "it")
    with pytest.raises(ValueError, match="it has 7 classes for 'verb', not 6"):
        predictions(1, counts={"verb": 7, "noun": 5}).aligned_to(ours, "it")
    other.labels["verb"][0] = (other.labels["verb"][0] + 1) % 6
    with pytest.raises(ValueError, match="it was made with other labels for 'verb'"):
        other.aligned_to(ours, "it")


def test_shapes_must_fit() -> None:
    made = predictions(samples=3)
    with pytest.raises(ValueError, match="every name must be unique"):
        Predictions(["a", "a", "b"], made.probabilities, made.labels, made.views, made.classes)
    with pytest.raises(ValueError, match="for 2 samples"):
        Predictions(["a", "b"], made.probabilities, made.labels, made.views, made.classes)
    with pytest.raises(ValueError, match="there are 2 class names"):
        Predictions(made.videos, made.probabilities, made.labels, made.views, {"verb": ["a", "b"]})


def test_the_submission_is_what_the_challenge_takes(tmp_path: Path) -> None:
    made = predictions(samples=4, counts={"verb": 97, "noun": 300})
    made.probabilities["verb"][1] = 0
    made.probabilities["verb"][1, 5] = 1  # the logarithm of 0 must not come out
    write_submission(tmp_path / "out.zip", made, (2, 3, 4))
    with ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == ["test.json"]
        content = json.loads(archive.read("test.json"))
    results = content.pop("results")
    assert content == {"version": "0.2", "challenge": "action_recognition", "sls_pt": 2, "sls_tl": 3, "sls_td": 4}
    assert list(results) == ["P01_0", "P01_1", "P01_2", "P01_3"]
    for row, scores in enumerate(results.values()):
        for head, count in (("verb", 97), ("noun", 300)):
            assert list(scores[head]) == [str(index) for index in range(count)]
            logs = np.array(list(scores[head].values()))
            # The server takes the softmax of what it gets.
            softmax = np.exp(logs - logs.max()) / np.exp(logs - logs.max()).sum()
            np.testing.assert_allclose(softmax, made.probabilities[head][row].double(), rtol=1e-5, atol=1e-12)
        assert len(scores["action"]) == 100
        product = made.probabilities["verb"][row].double()[:, None] * made.probabilities["noun"][row].double()
        best = product.flatten().topk(100).values
        assert list(scores["action"].values()) == pytest.approx(best.tolist())
        verb, noun = map(int, next(iter(scores["action"])).split(","))
        assert product[verb, noun] == product.max()
    before = (tmp_path / "out.zip").read_bytes()
    write_submission(tmp_path / "out.zip", made, (2, 3, 4))
    assert (tmp_path / "out.zip").read_bytes() == before


def test_submissions_of_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="submission needs"):
        write_submission(tmp_path / "out.zip", predictions(), (2, 3, 3))
    made = predictions(samples=2, counts={"verb": 97, "noun": 300})
    with pytest.raises(ValueError, match="several videos are called 'P01_0'"):
        write_submission(tmp_path / "out.zip", replace(made, videos=["a/P01_0.mp4", "b/P01_0.mp4"]), (2, 3, 3))
    with pytest.raises(ValueError, match=r"levels are \[2, 3, 6\]; they must be three from 0 to 5"):
        write_submission(tmp_path / "out.zip", made, (2, 3, 6))
