"""`cast demo` from end to end, on a handful of clips."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from cast import CAST, CASTConfig
from cast.cli import main as command
from cast.demo import main
from cast.demo.clips import CachedClips, Stills
from cast.demo.dataset import Sizes
from cast.demo.estimate import estimate
from cast.demo.models import CONFIG, HEADS, SingleStreams, cast_model, spatial_expert, temporal_expert
from cast.demo.results import METRICS, summarise
from cast.demo.run import IDENTITY, claim
from cast.demo.scale import FULL, QUICK, Scale
from cast.demo.scene import NOUNS, SPLITS, VERBS
from cast.demo.schedule import Schedule, Stage
from cast.demo.study import MODELS, Budget, Outcome, Study
from cast.metrics import harmonic_mean
from cast.training import Clips, Recipe

RECIPE = Recipe(epochs=1, batch_size=8, lr=1e-3, warmup=0.5)
SIZES, BUDGET = Sizes(plain=16, train=132, val=24), Budget(stills=40, spatial=RECIPE, temporal=RECIPE, models=RECIPE)
SCALE = Scale("tiny", SIZES, BUDGET)
SMALL = CASTConfig(**CONFIG.to_dict() | {"depth": 2, "embed_dim": 32, "num_heads": 2})


STREAM = ("\x1b", "\r", "\b")  # what moves a terminal's cursor


@dataclass
class Runs:
    """A run that was interrupted after both experts of seed 0, and the one that went on from it."""

    out: Path
    left: list[Stage]
    metrics: dict[str, Any]
    first: str
    second: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """By a clock that goes on by a second with each sample that is read, so that no other program moves it."""
    out, shown = tmp_path_factory.mktemp("demo"), [io.StringIO(), io.StringIO()]
    experts, now = Study._experts, [0.0]

    def interrupted(study: Study) -> None:
        experts(study)
        raise KeyboardInterrupt

    def counted(batch: Callable[..., Any]) -> Callable[..., Any]:
        def read(clips: Clips, epoch: int, indices: np.ndarray) -> Any:
            now[0] += len(indices)
            return batch(clips, epoch, indices)

        return read

    with pytest.MonkeyPatch.context() as patch:
        for measuring in ("cast.demo.estimate", "cast.demo.run"):
            patch.setattr(sys.modules[measuring], "time", SimpleNamespace(perf_counter=lambda: now[0]))
        for kind in (CachedClips, Stills):
            patch.setattr(kind, "batch", counted(kind.batch))
        patch.setattr(Study, "_experts", interrupted)
        with redirect_stdout(shown[0]), pytest.raises(KeyboardInterrupt):
            main(out, 2, scale=SCALE)
        patch.setattr(Study, "_experts", experts)
        left = estimate(out, 2, SCALE)
        with redirect_stdout(shown[1]):
            metrics = main(out, 2, scale=SCALE)
    return Runs(out, left, metrics, *(stream.getvalue() for stream in shown))


@pytest.fixture(scope="module")
def finished(runs: Runs) -> tuple[Path, dict[str, Any]]:
    return runs.out, runs.metrics


def test_a_run_that_was_interrupted_says_so_and_expects_only_the_rest(runs: Runs) -> None:
    assert runs.first.splitlines()[-1].endswith("stopped; the same command continues from the last checkpoint")
    units = {stage.name: stage.units for stage in runs.left}
    steps = {"spatial expert": 40 // 8, "temporal expert": 16 // 8, "cast": 132 // 8}
    assert units["videos"] == units["spatial expert, seed 0"] == units["temporal expert, seed 0"] == 0
    assert {name: units[f"{name}, seed 1"] for name in steps} == steps
    assert units["cast, seed 0"] == steps["cast"]


def test_what_was_expected_is_what_it_took(runs: Runs) -> None:
    """All trainings together, by a clock of work done."""
    names = ("spatial expert", "temporal expert", "alone", "ensemble", "cast")
    trained = [stage for stage in runs.metrics["stages"] if stage["name"].split(",")[0] in names]
    expected, took = (sum(stage[key] for stage in trained) for key in ("expected", "took"))
    assert len(trained) == 10
    assert took > 0
    assert expected == took


def test_progress_ends_at_a_hundred_percent_and_never_falls(runs: Runs) -> None:
    shares = [int(found) for found in re.findall(r"^ *(\d+) %  ", runs.second, re.MULTILINE)]
    assert len(shares) > 12
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert 100 not in shares[:-1]


def test_a_log_file_gets_lines_and_no_control_characters(runs: Runs) -> None:
    lines = runs.second.splitlines()
    assert lines[0].startswith("CAST demo: makes videos")
    assert re.match(r"Measured on this machine: about .* from here; ", lines[1])
    stages = len(runs.metrics["stages"])
    assert any(f"of {stages}, cast, seed 1: epoch 1: loss" in line for line in lines)
    assert not any(sign in runs.first + runs.second for sign in STREAM)


def test_a_terminal_gets_bars() -> None:
    screen, now = io.StringIO(), [0.0]
    console = Console(file=screen, force_terminal=True, width=100)
    with Schedule([Stage("steps", 4, 1.0)], console, lambda: now[0]) as schedule:
        for step in range(1, 5):
            now[0] += 1
            schedule.advance("steps", step, 4)
        schedule.finish()
    assert "━" in screen.getvalue()
    assert "100 %" in screen.getvalue()


def test_time_left_follows_what_was_measured_since() -> None:
    now = [0.0]
    schedule = Schedule([Stage("a", 10, 1.0), Stage("b", 20, 1.0)], Console(file=io.StringIO()), lambda: now[0])
    assert schedule.left() == schedule.expected() == 30
    now[0] = 15  # half of the first stage, at a third of the speed that was measured
    schedule.advance("a", 5, 10)
    pace = (15 + 3) / (5 + 3)  # the measurement weighs as much as a tenth of the run, 3 seconds
    assert schedule.left() == pytest.approx(15 + 20 * pace)
    now[0] = 30
    schedule.advance("a", 10, 10)
    assert schedule.left() == pytest.approx(20 * (30 + 3) / (10 + 3))
    now[0] = 40  # of 30 steps in all an earlier run had done 10; those left turn out to be faster
    schedule.advance("b", 20, 30)
    assert schedule.left() == pytest.approx(10)
    assert schedule.share() == pytest.approx(0.8)


@pytest.mark.parametrize(("first", "second"), [(FULL, QUICK), (QUICK, FULL)])
def test_one_demo_does_not_go_on_from_the_other(tmp_path: Path, first: Scale, second: Scale) -> None:
    claim(tmp_path, first)
    claim(tmp_path, first)
    with pytest.raises(ValueError, match=f"holds the {first.name} demo, and this is the {second.name} one: choose"):
        main(tmp_path, scale=second)
    assert [path.name for path in tmp_path.iterdir()] == [IDENTITY]


def test_videos_of_an_earlier_version_are_the_full_demos(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="holds the full demo"):
        claim(tmp_path, QUICK)
    claim(tmp_path, FULL)


def test_the_quick_demo_has_every_action_equally_often_and_whole_pairs() -> None:
    actions = len(QUICK.classes.verbs) * len(QUICK.classes.nouns)
    assert all(QUICK.sizes.of(split) % actions == 0 for split in SPLITS)
    assert QUICK.config.classes == QUICK.classes.heads()
    for first, second in zip(QUICK.classes.verbs[::2], QUICK.classes.verbs[1::2], strict=True):
        assert VERBS.index(first) % 2 == 0
        assert VERBS.index(second) == VERBS.index(first) + 1


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
        shares = [run[model]["action"] * SIZES.val / 100 for model in ("cast", "ensemble")]
        assert run["only_cast_right"] - run["only_ensemble_right"] == pytest.approx(shares[0] - shares[1], abs=0.01)
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
        return Outcome(seed, figures, {"x": figures["ensemble"]}, {}, {}, {}, (9, 1))

    summary = summarise([outcome(0, 20, 30), outcome(1, 22, 35), outcome(2, 24, 34)])
    assert summary["seed"] == [0, 1, 2]
    assert summary["ensemble"]["action"] == 22
    assert summary["spread"]["ensemble"]["action"] == 2
    assert summary["gain"]["action"] == {"mean": 11.0, "by_seed": [10.0, 13.0, 10.0]}
    # 10 tosses: 9 or 10 heads, or as many tails, in 2 * (10 + 1) of 1024 cases.
    assert summary["runs"][0]["chance_of_such_a_split"] == pytest.approx(22 / 1024)
    alone = summarise([outcome(7, 20, 30)])
    assert alone["seed"] == 7
    assert alone["spread"]["cast"]["verb"] == 0
