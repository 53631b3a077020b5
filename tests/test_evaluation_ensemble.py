"""`cast evaluate A B DATASET`: several saved models answer as one, by the mean of their probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cast_models import randomise
from evaluation_cases import CLASSES, COUNTS, small_cast, write_dataset

from cast.baselines import SingleExpert
from cast.cli import main
from cast.evaluation import read_predictions
from cast.loading import load_checkpoint, load_models

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

SIZES: dict[str, Any] = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def expert(path: Path, role: str = "clip", seed: int = 1, **sizes: Any) -> Path:
    model = SingleExpert(role, "cast", **(SIZES | {"heads": COUNTS} | sizes))
    randomise(model, seed).save_pretrained(path)  # type: ignore[operator]
    return path


@pytest.fixture
def spatial(tmp_path: Path) -> Path:
    return expert(tmp_path / "spatial")


@pytest.fixture
def temporal(tmp_path: Path) -> Path:
    return expert(tmp_path / "temporal", "videomae", 2)


def run(out: Path, *checkpoints: Path, data: Path) -> int:
    words = [*map(str, checkpoints), str(data), "--out", str(out), "--workers", "0"]
    return main(["evaluate", *words])


def test_an_ensemble_is_the_mean_of_its_members_answers(spatial: Path, temporal: Path, tmp_path: Path) -> None:
    data, whole = write_dataset(tmp_path / "data", 3), tmp_path / "whole"
    small_cast(depth=1).save_pretrained(whole)  # a member of another kind
    members = [spatial, temporal, whole]
    for member in members:
        assert run(tmp_path / f"of-{member.name}", member, data=data) == 0
    assert run(tmp_path / "both", *members, data=data) == 0

    answers = [read_predictions(tmp_path / f"of-{member.name}" / "predictions.jsonl") for member in members]
    ensemble = read_predictions(tmp_path / "both" / "predictions.jsonl")
    for head in COUNTS:
        mean = torch.stack([answer.probabilities[head].double() for answer in answers]).mean(0)
        # Float32 through a logarithm and a softmax: a few parts in ten million.
        torch.testing.assert_close(ensemble.probabilities[head].double(), mean, rtol=2e-6, atol=1e-7)
        assert (mean - answers[0].probabilities[head]).abs().max() > 1e-3
    assert ensemble.about["model"] == "Ensemble"
    assert ensemble.about["members"] == ["SingleExpert", "SingleExpert", "CAST"]
    assert ensemble.about["checkpoint"] == [str(member) for member in members]
    assert ensemble.about["sha256"] == [answer.about["sha256"] for answer in answers]
    assert list(ensemble.classes["verb"]) == CLASSES["verb"]

    page = (tmp_path / "both" / "report.html").read_text()
    sizes = [load_checkpoint(member).model for member in members]
    total, learnable = (sum(p.numel() for m in sizes for p in m.parameters() if p.requires_grad >= r) for r in (0, 1))
    assert f"{total:,}, of which {learnable:,} learnable" in page
    assert f"{spatial}, {temporal}, {whole}" in page
    # The second time it reads what it has answered.
    before = (tmp_path / "both" / "cost.json").read_text()
    assert run(tmp_path / "both", *members, data=data) == 0
    assert (tmp_path / "both" / "cost.json").read_text() == before
    assert json.loads(before)["clips"] == 18


def test_members_must_fit_each_other(
    spatial: Path, temporal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data", 1)
    wrong = {
        "the same heads": expert(tmp_path / "heads", heads={"verb": 6, "noun": 4}),
        "the same pixels": expert(tmp_path / "pixels", image_size=32),
        "the same frames": expert(tmp_path / "frames", num_frames=8),
        "in the ensemble twice": expert(tmp_path / "again"),
    }
    answers = tmp_path / "predictions.jsonl"
    answers.write_text("")
    for message, member in (*wrong.items(), ("members must be checkpoints of models", answers)):
        assert run(tmp_path / "out", spatial, member, data=data) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_members_must_agree_on_sampling_and_class_names(spatial: Path, temporal: Path) -> None:
    for path, sampling in ((spatial, "dense"), (temporal, "uniform")):
        (path / "sampling.json").write_text(json.dumps({"sampling": sampling}))
    with pytest.raises(ValueError, match=r"same sampling: .* has dense, .* has uniform; settle it with --sampling"):
        load_models([spatial, temporal], False)
    assert load_models([spatial, temporal], False, "uniform").sampling
    (temporal / "sampling.json").unlink()
    assert load_models([temporal, spatial], False).sampling == "dense"  # one that does not say follows the other

    (spatial / "labels.json").write_text(json.dumps(CLASSES))
    assert load_models([temporal, spatial], False).classes == CLASSES
    turned = {head: names[::-1] for head, names in CLASSES.items()}
    (temporal / "labels.json").write_text(json.dumps(turned))
    with pytest.raises(ValueError, match="must have the same class names"):
        load_models([spatial, temporal], False)
