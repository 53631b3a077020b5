"""`cast demo` from end to end, on a handful of clips."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from cast import CAST, CASTConfig
from cast.cli import main as command
from cast.demo import main
from cast.demo.dataset import Sizes
from cast.demo.models import CONFIG, HEADS, SingleStreams, cast_model, spatial_expert, temporal_expert
from cast.demo.results import METRICS, summarise
from cast.demo.scale import Scale
from cast.demo.scene import NOUNS, VERBS
from cast.demo.study import MODELS, Budget, Outcome
from cast.metrics import harmonic_mean
from cast.training import Recipe

RECIPE = Recipe(epochs=1, batch_size=8, lr=1e-3, warmup=0.5)
SIZES, BUDGET = Sizes(plain=16, train=132, val=24), Budget(stills=40, spatial=RECIPE, temporal=RECIPE, models=RECIPE)
SCALE = Scale("tiny", SIZES, BUDGET)
SMALL = CASTConfig(**CONFIG.to_dict() | {"depth": 2, "embed_dim": 32, "num_heads": 2})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo")
    return out, main(out, 2, scale=SCALE)


def test_metrics_have_the_promised_form(finished: tuple[Path, dict[str, Any]]) -> None:
    out, returned = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(returned))
    assert metrics["seed"] == [0, 1]
    for model in MODELS:
        assert metrics[model].keys() == set(METRICS)
        for name, value in metrics[model].items():
            assert 0 <= value <= 100
            assert value == pytest.approx(np.mean([run[model][name] for run in metrics["runs"]]), abs=0.011)
    for run in metrics["runs"]:
        best = max(figures["action"] for figures in run["ensembles"].values())
        assert run["ensemble"]["action"] == best
        assert run["cast"]["harmonic_mean"] == pytest.approx(
            harmonic_mean(run["cast"]["verb"], run["cast"]["noun"]), abs=0.02
        )
    assert metrics["step_ms"]["fused"] > 0
    assert len(metrics["controls"]) == 12


def test_the_report_is_one_file_with_everything_in_it(finished: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = finished
    page = (out / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "<script" not in page
    assert page.count("<svg") == 4
    assert page.count('<div class="clip">') == 8
    assert f"<b>{metrics['cast']['action']:.1f} %</b>" in page
    assert "val_00" in page
    assert "$" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def test_the_finished_model_names_actions(
    finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = finished
    video, checkpoint = out / "data" / "val" / "val_00003.mp4", out / "seed-1" / "cast"
    assert command(["predict", str(video), "--checkpoint", str(checkpoint), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    verb, noun = (answer["guesses"][head][0]["label"] for head in ("verb", "noun"))
    assert verb in VERBS
    assert noun in NOUNS


def test_a_second_run_reads_what_the_first_one_finished(finished: tuple[Path, dict[str, Any]]) -> None:
    out, first = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("step-*/*")}
    again = main(out, 2, scale=SCALE)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("step-*/*")} == before
    assert again["runs"] == first["runs"]


def test_another_budget_in_the_same_directory_is_refused(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    other = Budget(40, RECIPE, RECIPE, Recipe(epochs=2, batch_size=8, lr=1e-3))
    with pytest.raises(ValueError, match="choose another directory"):
        main(out, 1, scale=Scale("tiny", SIZES, other))


def test_no_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds is 0"):
        main(tmp_path, 0)
    assert not list(tmp_path.iterdir())


def experts() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return spatial_expert(SMALL, 0).state_dict(), temporal_expert(SMALL, 1).state_dict()


def test_only_cast_lets_one_stream_see_the_other() -> None:
    """The ensemble's verb must not depend on what the spatial expert's weights are; CAST's must."""
    spatial, temporal = experts()
    other = spatial_expert(SMALL, 5).state_dict()
    video = torch.randn(2, 3, 16, 32, 32)
    for exchange in (False, True):
        models = [cast_model(SMALL, weights, temporal, 3, exchange) for weights in (spatial, other)]
        for model in models:
            torch.manual_seed(4)
            for parameter in model.parameters():
                if parameter.requires_grad and not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.2)  # up-projections start at zero: nothing would flow
        first, second = (model(video) for model in models)
        assert torch.equal(first["verb"], second["verb"]) != exchange
        assert not torch.equal(first["noun"], second["noun"])


def test_single_streams_do_not_share_anything() -> None:
    """Gradients of one stream's losses reach that stream's parameters alone, so training both at once is fair."""
    spatial, temporal = experts()
    model = SingleStreams(SMALL, cast_model(SMALL, spatial, temporal, 0, exchange=False))
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    touched = []
    for stream in ("spatial", "temporal"):
        model.zero_grad()
        logits = model(torch.randn(2, 3, 16, 32, 32))
        (logits[f"{stream}_verb"].square().sum() + logits[f"{stream}_noun"].square().sum()).backward()
        touched.append({n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    assert touched[0]
    assert touched[1]
    assert not touched[0] & touched[1]
    assert touched[0] | touched[1] == {n for n, p in model.named_parameters() if p.requires_grad}


def test_all_models_start_from_the_same_frozen_experts() -> None:
    spatial, temporal = experts()
    ensemble, model = (cast_model(SMALL, spatial, temporal, 0, exchange) for exchange in (False, True))
    frozen = {n: p for n, p in ensemble.named_parameters() if not p.requires_grad}
    theirs = dict(model.named_parameters())
    assert frozen
    assert all(torch.equal(p, theirs[n]) and not theirs[n].requires_grad for n, p in frozen.items())
    assert isinstance(model, CAST)
    assert model.config.classes == HEADS


def test_gain_and_spread_over_seeds() -> None:
    def outcome(seed: int, ensemble: float, cast: float) -> Outcome:
        figures = {model: dict.fromkeys(METRICS, 10.0) for model in ("spatial", "temporal")}
        figures |= {"ensemble": dict.fromkeys(METRICS, ensemble), "cast": dict.fromkeys(METRICS, cast)}
        return Outcome(seed, figures, {"x": figures["ensemble"]}, {}, {}, {})

    summary = summarise([outcome(0, 20, 30), outcome(1, 22, 35), outcome(2, 24, 34)])
    assert summary["seed"] == [0, 1, 2]
    assert summary["ensemble"]["action"] == 22
    assert summary["spread"]["ensemble"]["action"] == 2
    assert summary["gain"]["action"] == {"mean": 11.0, "by_seed": [10.0, 13.0, 10.0]}
    alone = summarise([outcome(7, 20, 30)])
    assert alone["seed"] == 7
    assert alone["spread"]["cast"]["verb"] == 0
