"""`cast train` on every row of the paper's tables: what a recipe builds, what trains in it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("timm")

from cast.baselines import SINGLES, SingleExpert, TwoStream, read_baseline
from cast.cli import main
from cast.demo.dataset import Sizes, make_dataset
from cast.loading import load_checkpoint
from cast.study.tables import read_plan
from cast.training.models import blueprint, build, configure
from cast.training.recipes import load_recipe
from cast.training.settings import TrainSettings

PLAN = read_plan()
CLASSES = {"verb": ["open", "close", "cut"], "noun": ["door", "tap"]}
SMALL = ("model.depth=2", "model.embed_dim=16", "model.num_heads=2", "data.workers=0", "log.bars=false")
#: One model of each kind; two steps of 4 clips.
STEPS = (*SMALL, "optim.epochs=1", "optim.total_batch=4", "optim.micro_batch=4", "validate_every=0")


def recipe(*overrides: str, name: str = "digits") -> TrainSettings:
    return load_recipe(TrainSettings, name, *overrides)


def design(row: str) -> str:
    """What a row is called in a recipe."""
    return row if PLAN.models[row].single else PLAN.models[row].design


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("digits")
    make_dataset(directory, Sizes(plain=0, train=8, val=2), workers=1)
    return directory


DESIGNS_OF_ROWS = sorted({design(name) for name, model in PLAN.models.items() if not model.members})
#: They have the sizes of timm's models, so a recipe builds them at full size only.
OF_TIMM = {name for name in DESIGNS_OF_ROWS if "in21k" in name or "eva" in name}


@pytest.mark.parametrize("name", [name for name in DESIGNS_OF_ROWS if name not in OF_TIMM])
def test_what_should_train_in_a_row_has_a_gradient(name: str) -> None:
    settings = recipe(f"experts.design={name}", *SMALL)
    model, notes = build(settings, CLASSES)
    assert len(notes) == len(settings.experts.sources)
    video = torch.randn(2, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    sum(logits.square().sum() for logits in model(video).values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", ["eva-mvd", "in21k-independent"])
def test_rows_with_experts_of_timm(name: str) -> None:
    settings = recipe(f"experts.design={name}", "experts.train=true", name="ablation")
    with torch.device("meta"):
        model, _ = build(settings, CLASSES)
    assert model.config == configure(settings, CLASSES)
    with pytest.raises(ValueError, match="both experts need the same"):
        build(recipe(f"experts.design={name}", *SMALL), CLASSES)


def test_singles_are_the_ensembles_members() -> None:
    assert {name: model.single for name, model in PLAN.models.items() if model.single} == SINGLES
    assert set(PLAN.models["ensemble"].members) == set(SINGLES)


@pytest.mark.parametrize(("name", "kind"), [("lateral", TwoStream), ("single-temporal", SingleExpert)])
def test_a_row_trains_and_is_evaluated(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: Any
) -> None:
    out = tmp_path / "run"
    start = [f"data.root={data}", f"out={out}", *STEPS, f"experts.design={name}"]
    assert main(["train", "digits", *start]) == 0
    assert f"{kind.__name__}.from_pretrained" in capsys.readouterr().err
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["kind"] == "step"] == [1, 2]
    trained, (fresh, _) = read_baseline(out / "model"), build(recipe(*start), _classes(data))
    assert isinstance(trained, kind)
    changed = {key for key, tensor in fresh.state_dict().items() if not torch.equal(tensor, trained.state_dict()[key])}
    assert any("expert." in key for key in changed)
    assert any("head" in key for key in changed)

    assert main(["evaluate", str(out), str(data), "--out", str(tmp_path / "test"), "--workers", "0"]) == 0
    metrics = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert metrics["about"]["model"] == kind.__name__
    assert 0 <= metrics["metrics"]["noun_top1"] <= 100
    assert main(["predict", str(data / "val" / "val_00000.mp4"), "--checkpoint", str(out), "--json"]) == 0
    assert '"action"' in capsys.readouterr().out
    assert main(["export", str(out)]) == 1
    assert "is a baseline's, no CAST's: cast evaluate" in capsys.readouterr().err
    assert main(["train", "digits", *start[:-1], "experts.design=late-add", "--resume"]) == 1
    assert "is of another training" in capsys.readouterr().err


def _classes(data: Path) -> dict[str, list[str]]:
    classes: dict[str, list[str]] = json.loads((data / "classes.json").read_text())
    return classes


@pytest.mark.parametrize("name", ["lateral", "single-spatial"])
def test_what_is_saved_is_what_was_built(tmp_path: Path, name: str) -> None:
    model, _ = build(recipe(f"experts.design={name}", *SMALL), CLASSES)
    model.save_pretrained(tmp_path)
    again = load_checkpoint(tmp_path).model
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert blueprint(model)().state_dict().keys() == model.state_dict().keys()
    video = torch.zeros(1, 3, 16, 32, 32)
    assert all(torch.equal(logits, again(video)[head]) for head, logits in model.eval()(video).items())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"config"', '"other"'))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_checkpoint(tmp_path)


def test_experts_come_from_files(tmp_path: Path) -> None:
    """CLIP's and VideoMAE's by their names, in whichever role; frozen ones stay as the files have them."""
    source, _ = build(recipe("experts.design=clip-clip", *SMALL), CLASSES)
    assert isinstance(source, TwoStream)
    file = tmp_path / "clip.pth"
    torch.save(source.spatial.expert.state_dict(), file)
    settings = recipe("experts.design=clip-clip", f"experts.clip={file}", "experts.train=false", *SMALL)
    assert settings.experts.sources == ["clip"]
    model, notes = build(settings, CLASSES)
    assert isinstance(model, TwoStream)
    assert notes == []
    for stream in (model.spatial, model.temporal):
        given = source.spatial.expert.state_dict()
        assert all(torch.equal(tensor, given[key]) for key, tensor in stream.expert.state_dict().items())
        assert not stream.expert.conv1.weight.requires_grad


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("experts.design=ensemble",), "does not train: train single-spatial and single-temporal"),
        (("experts.design=latteral",), "did you mean 'lateral'?"),
        (("experts.design=lateral", "experts.cast=run"), "is a whole CAST"),
        (("experts.design=clip-clip", "experts.videomae=v.pth"), "takes clip only"),
        (("experts.spatial=s.pth",), "takes clip, videomae only"),
        (("experts.design=clip-mvd", "experts.temporal=download"), "is for experts of timm"),
    ],
)
def test_what_no_recipe_can_mean(overrides: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "digits", *overrides])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_expert_without_weights_is_named_by_its_setting() -> None:
    for name, missing in (
        ("clip-mvd", "experts.clip"),
        ("eva-videomae", "experts.spatial"),
        ("lateral", "experts.clip"),
    ):
        with pytest.raises(ValueError, match=f"{missing} names no weights"):
            build(recipe(f"experts.design={name}", "experts.train=false", *SMALL), CLASSES)
