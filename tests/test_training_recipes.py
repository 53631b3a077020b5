"""Recipes and their overrides: the published numbers, where they come from, and typos that are caught."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cast.cli import main
from cast.training import layer_scale
from cast.training.recipes import find_recipe, load_recipe, parse
from cast.training.settings import TrainSettings

ROOT = Path(__file__).parent.parent
PUBLISHED = ("ek100", "k400", "ssv2", "ablation")


def load(name: str, *overrides: str) -> TrainSettings:
    return load_recipe(TrainSettings, name, *overrides)


#: Those of `cast pretrain`, which tests/test_pretrain.py reads, have other settings.
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.stem.startswith("videomae"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    settings = load(str(path))
    assert settings.optim.accumulate(1) >= 1
    assert load(path.stem) == settings


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_number_has_its_source(name: str) -> None:
    for line in (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines():
        value = line.split("#")[0]
        if re.search(r":.*\d", value) and "classes" not in value and "root" not in value:
            assert re.search(r"# .*(paper|code|ours)", line), line


def test_table_4() -> None:
    """Paper Table 4 with 16 GPUs: batch, accumulation, actual rate, epochs, drop path, decay, mixing."""
    for name, total, accumulate, peak, epochs, drop, flip, mix in (
        ("ek100", 384, 4, 1.5e-3, 50, 0.2, 0.5, 0.9),
        ("k400", 576, 6, 2.25e-3, 70, 0.2, 0.5, 0.5),
        ("ssv2", 384, 4, 1.5e-3, 50, 0.3, 0.0, 0.9),
    ):
        settings = load(name)
        optim, augment = settings.optim, settings.data.augment
        assert (optim.total_batch, optim.micro_batch, optim.accumulate(16)) == (total, 6, accumulate)
        assert optim.peak == pytest.approx(peak)
        assert optim.floor == pytest.approx(1e-6 * total / 256)
        assert (optim.epochs, optim.warmup_epochs, optim.weight_decay, optim.layer_decay) == (epochs, 5, 0.05, 0.75)
        assert (settings.model.drop_path, settings.model.drop_path_mode) == (drop, "official")
        assert (augment.flip, augment.mixup, augment.cutmix, augment.smoothing) == (flip, 0.8, 0.0, 0.1)
        assert augment.mix_probability == mix
        assert (optim.clip_grad, optim.ema) == (None, None)
    assert layer_scale("blocks.0.cross_s_down.weight", 12, 0.75) == pytest.approx(0.0317, abs=5e-5)
    assert load("k400").data.sampling == "dense"
    assert load("ssv2").data.sampling == load("ek100").data.sampling == "uniform"


def test_the_ablations_defaults() -> None:
    ablation, ek100 = load("ablation"), load("ek100")
    assert ablation.optim.peak == pytest.approx(7.5e-4)
    assert ablation.optim.accumulate(16) == 2
    assert ablation.optim.layer_decay == 0.8
    assert (ablation.data, ablation.model) == (ek100.data, ek100.model)


def test_overrides_with_and_without_dashes() -> None:
    settings = load("ek100", "optim.lr=2e-3", "--data.root=somewhere", "model.exchange_layers=[9,10,11]", "seed=3")
    assert (settings.optim.lr, settings.data.root, settings.seed) == (2e-3, "somewhere", 3)
    assert settings.model.exchange_layers == (9, 10, 11)
    assert settings.optim.weight_decay == 0.05


def test_a_recipe_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("late-add") == find_recipe("rows/late-add") == find_recipe("recipes/rows/late-add.yaml")
    assert find_recipe("ek100") == find_recipe("recipes/ek100.yaml") == ROOT / "recipes" / "ek100.yaml"
    (tmp_path / "ek100").write_text("seed: 5\n")
    assert find_recipe("ek100") == Path("ek100")
    with pytest.raises(FileNotFoundError, match="did you mean 'k400'"):
        find_recipe("k40")
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_recipe("elsewhere/ek100.yaml")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["train", *arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ek100", "optim.lrr=1"], "sets optim.lrr, which is no setting: did you mean optim.lr?"),
        (["ek100", "--data.rot=x"], "did you mean data.root?"),
        (["ek100", "optim.learning_rate=1"], "no setting: optim has epochs, total_batch, micro_batch, lr, min_lr,"),
        (["ek100", "optim.warmup=5"], "did you mean optim.warmup_epochs?"),
        (["ek100", "otpim.lr=1"], "did you mean optim.lr?"),
        (["ek100", "drop_path=0.3"], "did you mean model.drop_path?"),
        (["ek100", "optim.lr=fast"], "optim.lr"),
        (["ek100", "run.precision=fp8"], "'fp32', 'bf16', 'fp16'"),
        (["ek100", "--optim.lr"], "write optim.lr=VALUE"),
        (["ek100", "ssv2"], "name one recipe"),
        (["ek100", "resume"], "name one recipe, then overrides as key=value; got ek100 resume"),
        (["optim.lr=1"], "name one recipe"),
        (["ek10"], "did you mean 'ek100'"),
        (["ek100", "optim.warmup_epochs=60"], "from 0 to epochs 50"),
        (["ek100", "data.size=112"], "model.image_size is 224, data.size 112"),
        (["ek100", "optim.ema=1.5"], "optim.ema is 1.5"),
        (["ek100", "experts.cast=a", "experts.clip=b"], "leave out experts.clip"),
        ([], "usage"),
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments:
        assert message in refused(capsys, *arguments)
    else:
        with pytest.raises(SystemExit) as caught:
            main(["train"])
        assert caught.value.code == 2


def test_a_typo_in_a_file_is_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {root: x, augment: {flipp: 0.5}}\n")
    assert f"{path} sets data.augment.flipp, which is no setting: did you mean data.augment.flip?" in refused(
        capsys, str(path)
    )
    path.write_text("- a list\n")
    assert "holds a list" in refused(capsys, str(path))
    path.write_text("data: {root: x\n")
    assert "mine.yaml" in refused(capsys, str(path))
    path.write_text("seed: 1\noptim:\n  lr: 1\n  betas: [0, 1]\n  lr: 2\n")
    assert f"{path} is no YAML: sets lr twice" in refused(capsys, str(path))
    path.write_bytes(b"data: {root: \xff}\n")
    assert "mine.yaml is no text in UTF-8" in refused(capsys, str(path))


def test_a_recipe_on_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("base: ek100\noptim: {lr: 0.5}\nmodel: {windows: [space, space]}\n")
    second.write_text(f"base: {first}\noptim: {{epochs: 7}}\ndata: {{root: there}}\n")
    made, base = load(str(second)), load("ek100")
    assert (made.optim.lr, made.optim.epochs, made.data.root) == (0.5, 7, "there")
    assert made.model.windows == ("space", "space")
    assert (made.data.val, made.optim.layer_decay) == (base.data.val, base.optim.layer_decay)
    first.write_text(f"base: {second}\n")
    assert f"{second} has the base {first}" in refused(capsys, str(first))
    first.write_text("base: [ek100]\n")
    assert "has the base ['ek100']; it must be a recipe's name or file" in refused(capsys, str(first))
    first.write_text("base: ek10\n")
    assert "no recipe 'ek10'" in refused(capsys, str(first))
    first.write_text("base: ek100\noptim: {lrr: 1}\n")
    assert f"{first} sets optim.lrr" in refused(capsys, str(first))


def test_a_hint_names_the_command_that_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "videomae", "zzz=1"])
    assert "cast pretrain --help names them all" in capsys.readouterr().err


def test_from_python_a_typo_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"did you mean optim\.lr"):
        load("ek100", "optim.lrr=1")


def test_print_config_is_a_recipe_that_says_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "ssv2", "optim.epochs=3", "optim.warmup_epochs=1", "--print_config"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["optim"]["ema"] is None
    (tmp_path / "again.yaml").write_text(text)
    assert load(str(tmp_path / "again.yaml")) == load("ssv2", "optim.epochs=3", "optim.warmup_epochs=1")


def test_switches_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    command = parse(TrainSettings, ["digits", "--resume", "seed=2"], "train", "", {"resume": "go on"})
    assert command.switches == {"resume"}
    assert command.settings.seed == 2
    assert command.recipe.stem == "digits"
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--optim.lr", "--data.root", "--resume", "--print_config"))


@pytest.mark.parametrize(
    ("processes", "micro", "advice"), [(16, 5, "out of 1, 2, 3, 4, 6, 8, 12, 24"), (7, 6, "a multiple of 7")]
)
def test_batches_that_cannot_be_shared(processes: int, micro: int, advice: str) -> None:
    optim = load("ek100", f"optim.micro_batch={micro}").optim
    with pytest.raises(ValueError, match=advice):
        optim.accumulate(processes)
