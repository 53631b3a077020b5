"""Commands in documents and recipes are commands that exist: every `cast ...` goes through the real parsers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cast import cli
from cast.pretrain.settings import PretrainSettings
from cast.training.recipes import load_recipe
from cast.training.settings import TrainSettings

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]
#: Commands with parsers of their own.
RECIPES = {"train": TrainSettings, "pretrain": PretrainSettings}
NAMES = {command.__name__ for command in cli.COMMANDS}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
_CALL = re.compile(r"(?:^|[ |(])(?:-m )?cast(?:\.cli)? +([a-z]+\b.*)")


def blocks(path: Path) -> list[list[str]]:
    """Whole commands, as words after `cast`: of code blocks, and of the comment that heads a recipe."""
    text = path.read_text()
    if path.suffix == ".yaml":
        text = "\n".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#  "))
    else:
        text = "\n".join(code for language, code in _FENCE.findall(text) if language in ("", "bash"))
    lines = text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    calls = [_CALL.search(line.split(" #")[0]) for line in lines if not line.startswith("#")]
    return [shlex.split(call[1]) for call in calls if call]


def mentions(path: Path) -> list[list[str]]:
    """Words after `cast` in running text, which may be parts of commands."""
    text = _FENCE.sub("", path.read_text())
    return [found.split() for found in re.findall(r"`cast ([^`]+)`", text)]


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse as `cast` would, and stop there; bad usage raises SystemExit or ValueError."""
    words = [word for word in words if word not in ("...", "[...]")]
    if words[0] in RECIPES:
        switches = {"--resume", "--print_config", "--help"}
        recipe, *overrides = [word for word in words[1:] if word not in switches] or ["digits"]
        required = () if any(word.startswith("data.root=") for word in overrides) else ("data.root=somewhere",)
        load_recipe(RECIPES[words[0]], recipe, *required, *overrides)
    elif "--help" not in words:
        monkeypatch.setattr(cli, "_run", lambda name, command: 0)
        assert cli.main(words) == 0


COMMANDS = [(path, words) for path in DOCUMENTS for words in blocks(path)]


def test_there_are_commands() -> None:
    assert {words[0] for _, words in COMMANDS} >= NAMES - {"demo"}
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(("path", "words"), COMMANDS, ids=[f"{p.stem}: {' '.join(w)[:50]}" for p, w in COMMANDS])
def test_a_command_in_a_document_parses(path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse(words, monkeypatch)


def test_a_command_that_does_not_parse_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "wrong.md"
    document.write_text(
        "```bash\ntorchrun -m cast.cli train ek100 \\\n    optim.lrr=1  # a typo\ncast predict a --chekpoint b\n```\n"
    )
    train, predict = blocks(document)
    assert train == ["train", "ek100", "optim.lrr=1"]
    with pytest.raises((ValueError, SystemExit)):
        parse(train, monkeypatch)
    with pytest.raises(SystemExit):
        parse(predict, monkeypatch)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.stem)
def test_what_running_text_mentions_exists(path: Path) -> None:
    """The command, its options, and recipes by name; values and positional arguments may be missing."""
    parsers = {action.dest: action for action in cli._parser()[0]._actions}["subcommand"].choices
    for words in mentions(path):
        command, options = words[0], {word.split("=")[0] for word in words if word.startswith("--")}
        if command.startswith("--"):
            continue
        assert command in NAMES, f"{path.name}: cast {' '.join(words)}"
        if command in RECIPES:
            assert options <= {"--resume", "--print_config", "--help"}, words
        else:
            known = {option for action in parsers[command]._actions for option in action.option_strings}
            assert {option for option in options if not option.startswith("--baselines.")} <= known, words


def test_the_recipe_of_each_row_is_in_the_study_s_table() -> None:
    text = (ROOT / "docs/study.md").read_text().split("## In full")[1].split("\n## ")[0]
    named = {word for line in text.splitlines() if line.startswith("| ") for word in re.findall(r"`([^`]+)`", line)}
    recipes = {path.stem for path in (ROOT / "recipes/rows").iterdir()}
    assert recipes <= named
    assert {word for word in named if not re.search(r"[.=/]", word)} == recipes
