"""`cast study`: every row of the paper's tables builds at both sizes, and two of them train from end to end."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("timm")

from cast import CAST
from cast.baselines import DESIGNS, SingleExpert, TwoStream
from cast.cli import main as command
from cast.demo.dataset import Sizes
from cast.model.config import make_config
from cast.study import main, report
from cast.study.data import StoredPictures
from cast.study.jobs import Job, Settings
from cast.study.models import EXPERTS, MINIATURE, expert_weights, miniature, needed_experts, small_expert
from cast.study.results import orderings, tally
from cast.study.run import print_table
from cast.study.tables import ROWS, Model, read_plan, select
from cast.training import Recipe
from cast.training.recipes import find_recipe, load_recipe
from cast.training.settings import TrainSettings

RECIPE = Recipe(epochs=1, batch_size=8, lr=1e-3, warmup=0.5)
SMALL = make_config(MINIATURE, depth=2, embed_dim=16, num_heads=2, down_ratio=2.0)
SETTINGS = Settings(Sizes(plain=16, train=24, val=24), 40, SMALL, RECIPE, RECIPE, RECIPE)
PLAN = read_plan()
#: Trained parameters at full size with EK100's heads, in millions, where the paper or the reference code has them.
TUNED = {"cast": 44.8, "independent-adapters": 18.1, "ratio-8": 19.4, "ratio-4": 26.1, "ratio-1": 103.4}
TUNED |= {"layers-quarter": 22.1, "layers-half": 29.6, "layers-three-quarters": 37.2}


@pytest.fixture(scope="module")
def experts() -> dict[str, Any]:
    return {name: expert_weights(name, small_expert(name, 0, SMALL)) for name in EXPERTS}


def test_the_plan_has_every_table() -> None:
    names = [f"table1{letter}" for letter in "abcdefgh"] + ["table5", "table7", "table8"]
    assert [table.name for table in PLAN.tables] == names
    assert sum(len(table.rows) for table in PLAN.tables) == 41
    assert all(row.paper is not None for table in PLAN.tables for row in table.rows)
    reference = {row.paper for table in PLAN.tables for row in table.rows if row.model == "cast"}
    assert reference == {(72.5, 60.3, 48.7)}
    assert set(PLAN.models) == {r.model for t in PLAN.tables for r in t.rows} | {"single-spatial", "single-temporal"}


def full_size(model: Model, heads: Mapping[str, int]) -> nn.Module:
    """The row's model as the paper trained it, with random weights. CAST's variations are `cast.CAST` itself."""
    config = make_config("base", heads)
    if model.single:
        return SingleExpert(model.single[0], model.single[1], config)  # type: ignore[arg-type]
    config = make_config(config, **{"exchange_layers": model.layers(config.depth), **model.config})
    return CAST(config) if model.design == "cast" else TwoStream(DESIGNS[model.design], config)


@pytest.mark.parametrize("name", [name for name, model in PLAN.models.items() if not model.members])
def test_every_row_builds_at_both_sizes(name: str, experts: dict[str, Any]) -> None:
    model = PLAN.models[name]
    with torch.device("meta"):
        full = full_size(model, {"verb": 97, "noun": 300})
    trained = sum(p.numel() for p in full.parameters() if p.requires_grad)
    if name in TUNED:
        assert round(trained / 1e6, 1) == TUNED[name]
    assert full(torch.empty(1, 3, 16, 224, 224, device="meta"))["noun"].shape == (1, 300)
    if not model.miniature:
        small = miniature(model, experts, 0, SMALL)
        assert small(torch.zeros(1, 3, 16, 32, 32))["verb"].shape == (1, 12)


def test_a_miniature_stands_on_the_experts_it_is_given(experts: dict[str, Any]) -> None:
    model = miniature(PLAN.models["eva-videomae"], experts, 0, SMALL)
    assert isinstance(model, TwoStream)
    theirs = experts["timm:eva02_base_patch16_clip_224"]
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.spatial.expert.state_dict().items())
    assert torch.equal(model.temporal.expert.blocks[1].mlp.fc1.weight, experts["videomae"]["blocks.1.mlp.fc1.weight"])
    whole = miniature(PLAN.models["cast"], experts, 0, SMALL)
    assert torch.equal(whole.blocks[0].clip_mlp.c_fc.weight, experts["clip"]["transformer.resblocks.0.mlp.c_fc.weight"])
    again = miniature(PLAN.models["cast"], experts, 0, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_quarters_of_the_layers() -> None:
    shares = [("layers-quarter", (3,), (9, 10, 11)), ("layers-half", (2, 3), tuple(range(6, 12)))]
    for name, small, full in shares:
        assert PLAN.models[name].layers(MINIATURE.depth) == small
        assert PLAN.models[name].layers(12) == full
    assert PLAN.models["cast"].layers(12) is None


@pytest.mark.parametrize("name", [name for name, model in PLAN.models.items() if not model.members])
def test_the_recipe_of_each_row_is_what_the_row_says(name: str) -> None:
    model, recipe = PLAN.models[name], load_recipe(TrainSettings, f"rows/{name}")
    design = f"single-{'spatial' if model.single[0] == 'clip' else 'temporal'}" if model.single else model.design
    assert recipe.experts.design == design
    wanted = make_config("base", **{"exchange_layers": model.layers(12), **model.config})
    for field in ("down_ratio", "windows", "exchange_layers", "directions", "positions"):
        assert getattr(recipe.model, field) == getattr(wanted, field), field
    defaults = load_recipe(TrainSettings, "ablation")
    assert (recipe.optim, recipe.data, recipe.run) == (defaults.optim, defaults.data, defaults.run)
    (figures,) = {row.paper for table in PLAN.tables for row in table.rows if row.model == name} or {()}
    if figures:
        assert f": verb {figures[0]}, noun {figures[1]}, action {figures[2]}." in find_recipe(name).read_text()


def test_rows_by_the_names_of_their_recipes() -> None:
    (table,) = select(["rows/late-add", "recipes/rows/cast.yaml", "late-add", "ensemble"]).tables
    assert [(row.model, row.paper) for row in table.rows] == [
        ("late-add", (68.9, 56.6, 44.2)), ("cast", (72.5, 60.3, 48.7)), ("ensemble", (68.2, 55.3, 42.9)),
    ]  # fmt: skip
    assert len(select(["cast", "table8"]).tables) == 2


def test_parity_labels() -> None:
    pictures = StoredPictures(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([3, 4, 9]), "parity")
    assert pictures.batch(0, torch.arange(3).numpy())[1]["parity"].tolist() == [1, 0, 1]


# -- from end to end


@pytest.fixture(scope="module")
def own_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "mine.yaml"
    content = yaml.safe_load(ROWS.read_text())
    models = {name: content["models"][name] for name in ("single-spatial", "single-temporal", "ensemble", "late-add")}
    models["clip-mvd"] = content["models"]["clip-mvd"]
    rows = [
        {"label": "Ensemble", "model": "ensemble", "paper": [68.2, 55.3, 42.9]},
        {"label": "Add", "model": "late-add", "paper": [68.9, 56.6, 44.2]},
        {"label": "MVD", "model": "clip-mvd"},
    ]
    path.write_text(yaml.safe_dump({"models": models, "tables": {"mine": {"title": "Two rows", "rows": rows}}}))
    return path


@pytest.fixture(scope="module")
def finished(own_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("study")
    return out, main([str(own_rows)], out, 1, 1, SETTINGS)


def test_two_rows_from_nothing_to_a_table(
    finished: tuple[Path, dict[str, Any]], own_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, study = finished
    assert json.loads((out / "study.json").read_text()) == json.loads(json.dumps(study))
    ensemble, add, mvd = study["tables"]["mine"]["rows"]
    assert ensemble["paper"] == {"verb": 68.2, "noun": 55.3, "action": 42.9}
    assert all(0 <= row["mean"][metric] <= 100 for row in (ensemble, add) for metric in ("verb", "noun", "action"))
    assert "position table" in mvd["not_run"]
    assert len(study["tables"]["mine"]["orderings"]) == 3
    assert (
        study["models"]["late-add"]["parameters"]["trained"]
        > study["models"]["single-spatial"]["parameters"]["trained"]
    )
    assert not list(out.rglob("step-*"))

    before = {path: path.stat().st_mtime_ns for path in out.rglob("seed-*/*/*/*")}
    again = main([str(own_rows)], out, 1, 1, SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("seed-*/*/*/*")} == before
    assert again["tables"] == study["tables"]
    printed = capsys.readouterr().out
    assert "mine.yaml: Two rows" in printed.replace("\n", "")
    assert "68.2" in printed
    assert "not run: MVD" in printed


def test_a_result_becomes_a_document(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    source, path = finished[0] / "study.json", tmp_path / "result.md"
    report.main(str(source), str(path))
    text, study = path.read_text(), finished[1]
    ensemble, add, _ = study["tables"]["mine"]["rows"]
    assert f"| Add | 68.9 | 56.6 | 44.2 | {add['mean']['verb']:.1f} ± 0.0 |" in text
    assert "| MVD | - | - | - | not run |  |  |" in text
    found = study["tables"]["mine"]["orderings"]
    reversed_ones = [o for o in found if o["verdict"] == "reversed"]
    assert all(f"{o['metric']}: {o['better']} over {o['worse']} (paper" in text for o in reversed_ones)
    assert text.count("(paper +") == len(reversed_ones)
    cells = [" / ".join(str(n) for n in counts.values()) for counts in tally(found).values()]
    assert f"| **all** | {' | '.join(cells)} |" in text
    assert f"on {SETTINGS.sizes.val} clips" in text
    assert f"| {ensemble['mean']['noun']:.1f} ± 0.0 |" in text


def test_the_committed_document_is_what_the_generator_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROWS.parents[2])
    report.main("benchmarks/results/study.json", str(tmp_path / "results.md"))
    written = (tmp_path / "results.md").read_text().replace(str(tmp_path / "results.md"), "benchmarks/results/study.md")
    assert Path("benchmarks/results/study.md").read_text() == written


def test_other_settings_in_the_same_directory_are_refused(
    finished: tuple[Path, dict[str, Any]], own_rows: Path
) -> None:
    out, _ = finished
    longer = Settings(SETTINGS.sizes, 40, SMALL, RECIPE, RECIPE, Recipe(epochs=2, batch_size=8, lr=1e-3))
    with pytest.raises(ValueError, match="was made with other settings or another model: choose another directory"):
        main([str(own_rows)], out, 1, 1, longer)


@pytest.mark.slow
def test_a_second_seed_adds_to_the_first_in_processes(finished: tuple[Path, dict[str, Any]], own_rows: Path) -> None:
    out, first = finished
    study = main([str(own_rows)], out, 2, 2, SETTINGS)
    for row, former in zip(study["tables"]["mine"]["rows"][:2], first["tables"]["mine"]["rows"][:2], strict=True):
        assert row["runs"][0] == former["runs"][0]
        assert len(row["runs"]) == 2


# -- what is said about the paper's orderings


def entry(label: str, paper: tuple[float, ...], *action: float) -> dict[str, Any]:
    runs = [{"verb": 1.0, "noun": 2.0, "action": value} for value in action]
    return {"label": label, "paper": dict(zip(("verb", "noun", "action"), paper, strict=True)), "runs": runs}


def test_labels_of_own_rows_are_printed_as_they_are() -> None:
    rows = [{"label": "mine [/b]", "paper": None, "not_run": "no [red] miniature"}]
    console = Console(record=True, width=120, file=io.StringIO())
    print_table(console, {"title": "[t]", "source": "own [/]", "rows": rows, "orderings": []})
    shown = console.export_text()
    for words in ("own [/]: [t]", "mine [/b]", "not run: mine [/b]: no [red] miniature"):
        assert words in shown


def test_orderings() -> None:
    rows = [entry("a", (1, 1, 40), 10, 20, 30), entry("b", (1, 1, 48), 11, 22, 33), entry("c", (1, 1, 45), 12, 19, 34)]
    found = {(o["better"], o["worse"]): o for o in orderings(rows)}
    assert {o["metric"] for o in found.values()} == {"action"}
    assert found["b", "a"]["verdict"] == "holds"
    assert found["b", "a"]["by_seed"] == [1, 2, 3]
    assert found["b", "a"]["gain"] == 2
    assert found["b", "a"]["paper"] == 8
    assert found["c", "a"]["verdict"] == "undecided"
    assert found["b", "c"]["verdict"] == "undecided"
    assert orderings([entry("x", (1, 1, 2), 5, 5), entry("y", (1, 1, 1), 6, 7)])[0]["verdict"] == "reversed"
    assert tally(list(found.values()))["action"] == {"holds": 1, "undecided": 2, "reversed": 0}
    assert orderings([entry("x", (1, 1, 2), 5), {"label": "y", "paper": None, "runs": []}]) == []


def test_what_is_written_about_a_row_does_not_make_it_another() -> None:
    one, other = (Job("a", 0, Model(open=text)).identity(SETTINGS) for text in ("", "a remark"))
    assert one == other
    assert Job("a", 0, Model(config={"down_ratio": 4})).identity(SETTINGS) != one
    assert Job("a", 1, Model()).identity(SETTINGS) != one


# -- bad input


def test_names_of_tables() -> None:
    assert [table.name for table in select(["table1b", "table8"]).tables] == ["table1b", "table8"]
    assert len(select(["all"]).tables) == 11
    assert select(["table1a"]).trained() == [
        "independent",
        "independent-adapters",
        "single-spatial",
        "single-temporal",
        "cast",
    ]
    assert needed_experts(PLAN.models["videomae-videomae"]) == {"videomae"}
    for names in (["table2"], ["all", "table2"]):
        with pytest.raises(ValueError, match="unknown table 'table2'; there are all, table1a"):
            select(names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": []}, "must have the keys 'models' and 'tables'"),
        ({"models": {"a": {"desing": "cast"}}, "tables": {}}, "model a: unknown keys desing"),
        ({"models": {"a": {"design": "cats"}}, "tables": {}}, "model a: design is 'cats'"),
        ({"models": {"a": {"config": {"down": 2}}}, "tables": {}}, "model a: unknown override 'down'"),
        ({"models": {"a": {"share": 0}}, "tables": {}}, "model a: share is 0"),
        ({"models": {"a": {"members": ["b"]}}, "tables": {}}, "model a: unknown member 'b'"),
        ({"models": {"a": None}, "tables": {"t": {"rows": [{"label": "x", "model": "b"}]}}}, "unknown model 'b'"),
        (
            {"models": {"a": None}, "tables": {"t": {"rows": [{"label": "x", "model": "a", "paper": [1]}]}}},
            r"paper is \[1\]; it must be",
        ),
        ({"models": {"cast": {"config": {"down_ratio": 4}}}, "tables": {}}, "define the model 'cast' differently"),
        (
            {"models": {"a": None}, "tables": {"table1a": {"rows": [{"label": "x", "model": "a"}]}}},
            "define the table 'table1a' differently",
        ),
        ({"models": {"a": None}, "tables": []}, "each with entries by name"),
        ({"models": {"a": "cast"}, "tables": {}}, "model a: is 'cast'; it must be fields by name"),
        ({"models": {"a": {"single": "clip"}}, "tables": {}}, "single is 'clip'; it must be a list"),
        ({"models": {"a": {"single": ["clip"]}}, "tables": {}}, "an expert and its adapters"),
        ({"models": {"a": None}, "tables": {"t": {}}}, "t: needs 'rows'"),
        ({"models": {"a": None}, "tables": {"t": {"rows": [{"model": "a"}]}}}, "entries have a 'label'"),
        (
            {"models": {"a": None, "b": {"members": ["a"]}, "c": {"members": ["b"]}}, "tables": {}},
            "model c: the member 'b' is not trained itself",
        ),
    ],
)
def test_bad_files(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        select([str(tmp_path / "rows.yaml"), "table1a"])


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command(["study", "table9", "--out", str(tmp_path)]) == 1
    assert "cast study: error: unknown table 'table9'" in capsys.readouterr().err
    assert command(["study", "table1a", "--seeds", "0", "--out", str(tmp_path)]) == 1
    assert "seeds is 0" in capsys.readouterr().err
    (tmp_path / "rows.yaml").write_text("models: [")
    assert command(["study", str(tmp_path / "rows.yaml"), "--out", str(tmp_path)]) == 1
    assert "is no YAML" in capsys.readouterr().err
    own = {"models": {"a": {"design": "clip-mvd"}}, "tables": {"t": {"rows": [{"label": "x", "model": "a"}]}}}
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(own))
    assert command(["study", str(tmp_path / "rows.yaml"), "--out", str(tmp_path)]) == 1
    assert "no miniature of the expert mvd" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command(["study"])
