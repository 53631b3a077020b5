"""The report, the figures in it, the attention maps, the cost and the learning curves."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cast_models import small_model, small_video
from evaluation_cases import predictions

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from cast import CAST
from cast.evaluation import Predictions, Protocol, metrics, summarise
from cast.evaluation.attention import cross_attention
from cast.evaluation.cost import ModelCost, model_cost
from cast.evaluation.inference import Cost
from cast.evaluation.published import EK100, K400_SSV2, dataset_name
from cast.evaluation.report import Evidence, html, plots
from cast.evaluation.report.classes import _rank, confusions
from cast.evaluation.report.clips import chosen
from cast.evaluation.report.curves import read_log, thinned
from cast.evaluation.report.plots import Bar, Point, balance, bars, heat, lines, sorted_gains
from cast.evaluation.summary import f1_gains, meanings
from cast.metrics import harmonic_mean

HEADINGS = re.compile(r"<h2>(.*?)</h2>")


def _by_hand() -> Predictions:
    """Four videos, two verbs and three nouns; the verb is right in three, the noun in two, both in one."""
    verb = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    noun = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.1, 0.8, 0.1], [0.3, 0.4, 0.3]])
    labels = {"verb": torch.tensor([0, 1, 0, 1]), "noun": torch.tensor([0, 0, 2, 1])}
    views = {
        "verb": torch.tensor([[0, 0], [1, 0], [0, 0], [0, 0]]),
        "noun": torch.tensor([[0, 1], [2, 2], [1, 1], [1, 1]]),
    }
    names = {"verb": ["open", "close"], "noun": ["door", "tap", "pan"]}
    return Predictions(["a", "b", "c", "d"], {"verb": verb, "noun": noun}, labels, views, names)


def test_every_figure_by_hand() -> None:
    found = metrics(_by_hand())
    verb_f1 = [2 * 2 / (2 + 3), 2 * 1 / (2 + 1)]  # truth 0 1 0 1, guess 0 1 0 0
    noun_f1 = [2 * 1 / (2 + 1), 2 * 1 / (1 + 2), 0.0]  # truth 0 0 2 1, guess 0 2 1 1
    assert found == pytest.approx(
        {
            "verb_top1": 75.0,
            "verb_mean_class_accuracy": 75.0,
            "verb_f1_macro": 100 * sum(verb_f1) / 2,
            "verb_f1_weighted": 100 * sum(verb_f1) / 2,
            "verb_single_view_top1": 62.5,
            "noun_top1": 50.0,
            "noun_mean_class_accuracy": 50.0,
            "noun_f1_macro": 100 * sum(noun_f1) / 3,
            "noun_f1_weighted": 100 * (2 * noun_f1[0] + noun_f1[1]) / 4,
            "noun_single_view_top1": 37.5,
            "action_top1": 25.0,
            "action_mean_class_accuracy": 25.0,
            "harmonic_mean": 60.0,
        }
    )


def test_the_summary_compares_with_every_baseline() -> None:
    ours, theirs = predictions(0), predictions(1, skill=1.0)
    summary = json.loads(json.dumps(summarise(ours, {"spatial": theirs}), allow_nan=False))
    entry = summary["baselines"]["spatial"]
    for name, value in summary["metrics"].items():
        assert entry["gain"][name] == pytest.approx(value - entry["metrics"][name])
    rows = summary["classes"]["noun"]
    gains = [row["f1_gain"]["spatial"] for row in rows if row["videos"]]
    assert entry["f1_gain"]["noun"]["mean"] == pytest.approx(sum(gains) / len(gains))
    assert entry["f1_gain"]["noun"]["classes_better"] == sum(gain > 0 for gain in gains)
    assert entry["f1_gain"]["noun"]["classes_worse"] == sum(gain < 0 for gain in gains)
    wrong = int((~ours.hits("verb")).sum())
    assert sum(pair["count"] for pair in summary["confusions"]["verb"]) == wrong  # fewer than 20 kinds of mistakes
    low, high = summary["confidence_95"]["action"]
    assert low < summary["metrics"]["action_top1"] < high
    paired = entry["paired"]["action"]
    assert paired["won"] - paired["lost"] == int(ours.hits("action").sum()) - int(theirs.hits("action").sum())


def test_classes_that_stay_as_they_were_are_neither_better_nor_worse() -> None:
    same = summarise(predictions(), {"itself": predictions()})["baselines"]["itself"]["f1_gain"]["noun"]
    assert same == {"mean": 0.0, "classes_better": 0, "classes_worse": 0}


def test_a_class_without_videos_has_no_gain() -> None:
    """Both models guess a pan where none is: 0 % against 0 % would count as a class that stayed as it was."""
    made = _by_hand()
    made.labels["noun"][2] = 1
    assert f1_gains(made, made, "noun").isnan().tolist() == [False, False, True]


def test_classes_are_ranked_by_mean_gain_or_by_f1_from_the_top() -> None:
    assert _rank([0, 1, 2], {}, [10.0, 30.0, 20.0]) == [1, 2, 0]
    gains = {"a": [4.0, 1.0, math.nan, 9.0], "b": [2.0, 1.0, 5.0, 9.0]}
    assert _rank([0, 1, 2], gains, [0.0, 90.0, 0.0, 0.0]) == [2, 0, 1]


class _Outside(HTMLParser):
    """Collects what a page would fetch, and checks that elements close."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("data:", "#")):
                self.fetched.append(f"{tag} {name}={value}")


def _evidence(**parts: Any) -> Evidence:
    return Evidence("A <title>", predictions(), Protocol(size=32), **parts)


def test_the_page_is_one_file_and_shows_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"epoch": 1, "loss": 3.5, "lr": 0.1, "val verb": 20}\n')
    page = html(
        _evidence(
            baselines={"spatial <b>": predictions(1, skill=1)},
            model_cost=ModelCost(216_808_333, 44_784_781, 390.499),
            cost=Cost(240, 60.0, 2, "NVIDIA H100", 3 << 30, 0),
            log=read_log(tmp_path / "log.jsonl"),
            facts={"<i>name": "<i>value"},
        )
    )
    assert "<i>" not in page
    outside = _Outside()
    outside.feed(page)
    assert (outside.fetched, outside.scripts) == ([], 0)
    assert HEADINGS.findall(page) == [
        "Accuracy", "Balanced understanding", "Against the baselines", "Class by class", "What is taken for what",
        "Learning curves", "Model card", "How to read this",
    ]  # fmt: skip
    for words in (
        "216,808,333",
        "44,784,781 learnable",
        "390.5 GMACs a view",
        "2,343 a video",
        "4.0 clips/s",
        "3.00 GiB",
    ):
        assert words in page
    assert "A &lt;title&gt;" in page
    assert "spatial <b>" not in page


def test_what_is_not_there_has_no_section_but_a_hint() -> None:
    page = html(_evidence())
    assert "arXiv" not in page
    assert page == html(_evidence())  # the same bytes for the same evidence
    assert HEADINGS.findall(page) == [
        "Accuracy", "Balanced understanding", "Class by class", "What is taken for what", "Model card",
        "How to read this",
    ]  # fmt: skip
    assert "--baselines.NAME FILE" in page
    assert "--log FILE" in page
    made = predictions()
    unlabelled = Predictions(made.videos, made.probabilities, {}, made.views, made.classes)
    page = html(replace(_evidence(), model=torch.nn.Linear(1, 1)))
    assert "Not shown" in page
    assert "attention, which only a CAST with an exchange has" in page
    page = html(Evidence("Test set", unlabelled, Protocol(size=32)))
    assert HEADINGS.findall(page) == ["Model card", "How to read this"]
    assert "the data set has no labels" in page


def test_published_results_stand_beside_published_data_sets_only() -> None:
    assert dataset_name({"noun": 300, "verb": 97}) == "EK100"
    assert dataset_name({"action": 400}) == "K400"
    assert dataset_name({"action": 401}) is None
    # The paper's own harmonic means, for the figures here that enter them.
    by_name = {point.method: point for point in K400_SSV2}
    assert round(harmonic_mean(by_name["CAST"].space, by_name["CAST"].time), 1) in (77.8, 77.9)
    for method, printed in (("CLIP", 59.5), ("AIM", 75.4), ("VideoMAE", 75.8), ("OMNIVORE", 77.2), ("BEVT", 75.3)):
        assert harmonic_mean(by_name[method].space, by_name[method].time) == pytest.approx(printed, abs=0.06)
    assert {point.method: (point.time, point.space) for point in EK100}["CAST"] == (72.5, 60.9)
    page = html(Evidence("K400", predictions(counts={"action": 400}), Protocol("dense")))
    assert "One data set gives one coordinate" in page
    assert "arXiv 2311.18825" in page


def test_models_at_zero_and_at_a_hundred_can_be_drawn() -> None:
    for points in ([Point("a", 0, 0)], [Point("a", 100, 100)], [Point("a", 0, 100), Point("b", 50, 0)]):
        assert balance(points, [], ("noun", "verb")).startswith("<svg")


def test_what_lies_on_an_axis_is_drawn_whole() -> None:
    """Matplotlib cuts markers at the axes, and F1 of 0 is common where classes are rare."""

    def cut(drawn: str) -> int:
        return len(re.findall(r'<g clip-path="[^"]*">\s*<use', drawn))

    assert cut(balance([Point("a", 0, 50)], [], ("noun", "verb"))) == 0
    assert cut(bars([Bar("open", 0.0, {"spatial": 0.0})], "CAST", "F1, %")) == 0


def test_a_class_without_videos_is_no_row_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """No share of its videos is told as anything: a cell of 0 % would be made up."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "heat", lambda values, *words: drawn.append((values, words)) or "")
    made = _by_hand()
    confusions(made, summarise(made, {}))
    made.labels["noun"][2] = 1  # no video of a pan is left
    confusions(made, summarise(made, {}))
    nouns = [entry for entry in drawn if len(entry[0]) == 3]
    assert not np.isnan(nouns[0][0]).any()
    assert np.isnan(nouns[1][0][2]).all()
    assert np.allclose(np.nansum(nouns[1][0], 1), [100, 100, 0])
    assert "grey" in nouns[1][1][1]
    assert "grey" not in nouns[0][1][1]


def test_a_gap_in_a_matrix_is_drawn() -> None:
    values = np.array([[100.0, 0.0], [np.nan, np.nan]])
    assert "#d4d4d4" in heat(values, "guess", "truth", ["open", "close"])


def test_the_figures_of_one_head_are_not_explained_as_those_of_pairs() -> None:
    """A single head is called `action` as well, so its figures share names with those of a (verb, noun) pair."""
    one_head = meanings(predictions(counts={"action": 6}))
    assert not [name for name in one_head if name.startswith("action") or name == "harmonic_mean"]
    assert {"top1", "top5", "mean_class_accuracy", "single_view_top1"} <= one_head.keys()
    both = meanings(predictions())
    assert {"action_top1", "action_top5_joint", "action_mean_class_accuracy", "harmonic_mean"} <= both.keys()
    assert "argmax of the verbs" not in html(Evidence("one", predictions(counts={"action": 6}), Protocol(size=32)))


@pytest.mark.parametrize("name", [r"a $\foo$", "from $5 to $9", "_left"])
def test_names_from_data_are_drawn_as_they_are(name: str) -> None:
    drawn = [
        bars([Bar(name, 50, {name: 40})], name, "F1"),
        balance([Point(name, 10, 20)], [], ("noun", "verb"), [Point(name, 30, math.nan)]),
        lines({name: ([1, 2], [3, 4])}, "step", "loss"),
        sorted_gains({name: [1.0, 2.0]}),
    ]
    for picture, times in zip(drawn, (3, 2, 1, 1), strict=True):  # SVG has each text as it is in a comment
        assert len(re.findall(f"<!-- .*{re.escape(name)}", picture)) == times


def test_videos_are_chosen_by_outcome() -> None:
    ours, theirs = predictions(0), predictions(1, skill=1)
    groups = chosen(ours, {"spatial": theirs})
    assert sum(group.total for group in groups) == 40
    mine, other = ours.hits("action"), theirs.hits("action")
    outcomes = {
        "Only CAST is right": (True, False),
        "CAST and a baseline are right": (True, True),
        "Only a baseline is right": (False, True),
        "All are wrong": (False, False),
    }
    for group in groups:
        assert 1 <= len(set(group.videos)) <= 2
        assert {(bool(mine[n]), bool(other[n])) for n in group.videos} == {outcomes[group.title]}
    assert [group.title for group in chosen(ours, {})] == ["Right", "Wrong"]


@pytest.mark.parametrize(
    "windows", [("time", "space"), ("space", "time"), ("space-time", "space-time")], ids=lambda w: "-".join(w)
)
@pytest.mark.parametrize("positions", [True, False])
def test_attention_is_what_the_exchange_computes(windows: tuple[str, str], positions: bool) -> None:
    """With values that name their token, the exchange's own answer shows the weights."""
    model = small_model(windows=windows, positions=positions)
    video = small_video(model, batch=2)
    expected = model(video)
    maps = cross_attention(model, video)
    assert len(maps) == 2
    for name, logits in model(video).items():
        assert torch.equal(logits, expected[name])  # the model is as it was
    assert "exchange" not in model.blocks[0].__dict__
    spatial, temporal = model.embed(video)
    block = model.blocks[0]
    spatial, temporal = block._attend_spatial(spatial), block._attend_temporal(temporal)
    streams = {
        "s": block.ln_s_cross(block.cross_s_down(spatial))[:, :, 1:],
        "t": block.ln_t_cross(block.cross_t_down(temporal)),
    }
    for direction, window in zip(("t2s", "s2t"), windows, strict=True):
        over_time, over_space = _naive(block, direction, window, streams[direction[-1]], streams[direction[0]])
        found = maps[0][direction]
        assert found.window == window
        for got, want in ((found.over_time, over_time), (found.over_space, over_space)):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)
        if found.over_time is not None:
            torch.testing.assert_close(found.over_time.sum(-1), torch.ones(2, 3))
        if found.over_space is not None:
            torch.testing.assert_close(found.over_space.mean(), torch.ones(()))


@pytest.mark.filterwarnings("ignore:.*by its modules")
def test_attention_is_that_of_layers_that_were_wrapped() -> None:
    ours, same = small_model(), small_model()
    ours.blocks[0].get_submodule("t2s_cross.t2s_q").register_forward_hook(lambda _, args, output: 4 * output)
    with torch.no_grad():
        same.blocks[0].get_submodule("t2s_cross.t2s_q").weight.mul_(4)
    got, want = (cross_attention(model, small_video(model))[0]["t2s"].over_time for model in (ours, same))
    torch.testing.assert_close(got, want)


def _naive(
    block: Any, direction: str, window: str, asking: torch.Tensor, answering: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Token by token: who may look at whom, softmax over those, then sums over the axes."""
    p = getattr(block.gathered(), direction)
    clips, frames, patches, width = asking.shape
    heads = block.num_heads
    weights = torch.zeros(clips, heads, frames, patches, frames, patches, dtype=asking.dtype)
    for t in range(frames):
        for n in range(patches):
            keys = [
                (kt, kn) for kt in range(frames) for kn in range(patches)
                if (window != "time" or kn == n) and (window != "space" or kt == t)
            ]  # fmt: skip

            def place(time: int, patch: int) -> int:
                return {"time": time, "space": patch, "space-time": time * patches + patch}[window]

            ask = asking[:, t, n] + (0 if p.q_pos is None else p.q_pos[place(t, n)])
            query = (ask @ p.q_weight.T + p.q_bias).unflatten(-1, (heads, -1))
            scores = []
            for kt, kn in keys:
                answer = answering[:, kt, kn] + (0 if p.kv_pos is None else p.kv_pos[place(kt, kn)])
                key = (answer @ p.kv_weight[:width].T + p.kv_bias[:width]).unflatten(-1, (heads, -1))
                scores.append((query * key).sum(-1) / (width // heads) ** 0.5)
            for (kt, kn), share in zip(keys, torch.stack(scores, -1).softmax(-1).unbind(-1), strict=True):
                weights[:, :, t, n, kt, kn] = share
    mean = weights.mean(1)
    over_time = None if window == "space" else mean.sum(-1).mean(2)
    if window == "time":
        return over_time, None
    received = mean.sum((1, 2)) / (patches if window == "space" else frames * patches)
    return over_time, received * (patches if window == "space" else frames * patches)


def test_the_base_model_costs_what_the_paper_says() -> None:
    with torch.device("meta"):
        model = CAST(heads={"verb": 97, "noun": 300})
    cost = model_cost(model, 16, 224)
    assert cost == ModelCost(216_808_333, 44_784_781, pytest.approx(390.5, abs=0.05))


def test_the_log_of_cast_train_is_read(tmp_path: Path) -> None:
    lines = [
        {"kind": "start", "step": 0, "steps": 4, "settings": {"optim": {"lr": 1.0}, "loss": 3, "verb": 5}},
        {"kind": "step", "step": 1, "loss": 2.5, "verb": 10.0, "lr": 0.1, "grad_norm": 1.0, "clips_per_s": 3.0},
        {"kind": "step", "step": 2, "loss": 2.0, "verb": 20.0, "lr": 0.2, "grad_norm": 1.0, "clips_per_s": 3.0},
        {"kind": "epoch", "step": 2, "epoch": 1, "loss": 2.25, "verb": 15.0, "val loss": 2.1, "val verb": 12.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = read_log(tmp_path / "log.jsonl")
    assert log.losses == {"loss": ([1, 2], [2.5, 2.0]), "epoch loss": ([2], [2.25]), "val loss": ([2], [2.1])}
    assert log.accuracies == {
        "verb": ([1, 2], [10, 20]), "epoch verb": ([2], [15]), "val verb": ([2], [12])
    }  # fmt: skip
    assert log.rates == {"lr": ([1, 2], [0.1, 0.2])}
    assert log.ignored_lines == 0


def test_logs_of_many_kinds_are_read(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "epoch": 0, "loss": 2.5, "lr": 0.1, "seconds": 3, "note": "hello"},
        {"step": 2, "epoch": 0, "loss": 2.0, "lr": 0.2, "val": {"verb_top1": 30.0, "loss": 2.2}, "drop_fraction": 0.1},
        {"step": 3, "epoch": 1, "loss": float("nan"), "acc": 40, "ok": True, "grad_accumulation": 4},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n\n[1]\n{"step": 4, "lo'
    (tmp_path / "log.jsonl").write_text(text)
    log = read_log(tmp_path / "log.jsonl")
    assert log.axis == "step"
    assert log.losses == {"loss": ([1, 2], [2.5, 2.0]), "val loss": ([2], [2.2])}
    assert log.accuracies == {"val verb_top1": ([2], [30.0]), "acc": ([3], [40.0])}
    assert log.rates == {"lr": ([1, 2], [0.1, 0.2])}
    assert log.ignored_lines == 2
    (tmp_path / "log.jsonl").write_text('{"epoch": 1, "loss": 3}\n{"epoch": 2, "step": 9, "loss": 2}\n')
    assert read_log(tmp_path / "log.jsonl").losses == {"loss": ([1, 2], [3, 2])}
    (tmp_path / "log.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="is it a training's log"):
        read_log(tmp_path / "log.jsonl")
    long = thinned({"loss": (list(range(1000)), [float(step % 2) for step in range(1000)])}, 100)["loss"]
    assert len(long[0]) == 100
    assert set(long[1]) == {0.5}
