"""Commands in documents and recipes are commands that exist: every `cast ...` goes through the real parsers."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cast import cli
from cast.pretrain.settings import PretrainSettings
from cast.training.recipes import load_recipe
from cast.training.settings import TrainSettings

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "recipes").glob("*.yaml")),
]
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


#: What makes another evaluation of one and the same model and data.
_ANSWERS = ("--split", "--sampling", "--views", "--crops", "--dtype", "--format")


def work(words: list[str]) -> tuple[str, tuple[str, ...]] | None:
    """The directory that a command fills, and what it fills it with; None where only a part of the command is shown."""
    if words[0] not in (*RECIPES, "evaluate") or "..." in words or words[1:2] == ["--help"]:
        return None
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if words[0] == "evaluate":
        options = dict(itertools.pairwise(words))
        given = tuple(f"{option} {options[option]}" for option in _ANSWERS if option in options)
        return options.get("--out", "runs/evaluation"), (
            *itertools.takewhile(lambda word: not word.startswith("--"), words),
            *given,
        )
    recipe = Path(words[1]).stem
    overrides = [word for word in words[2:] if "=" in word]
    out = next((word.removeprefix("out=") for word in overrides if word.startswith("out=")), f"runs/{recipe}")
    return out, (words[0], recipe, *sorted(overrides))


def collisions(calls: list[list[str]]) -> list[str]:
    """Directories that commands of one page would fill with different things: the second ends in a refusal."""
    filled: dict[str, set[tuple[str, ...]]] = {}
    for out, content in filter(None, map(work, calls)):
        filled.setdefault(out, set()).add(content)
    return [f"{out}: {sorted(contents)}" for out, contents in filled.items() if len(contents) > 1]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_of_one_page_fill_directories_of_their_own(path: Path) -> None:
    assert not collisions(blocks(path))


def test_two_commands_for_one_directory_are_found() -> None:
    calls = [
        ["evaluate", "runs/a", "data"],
        ["evaluate", "runs/b", "data"],
        ["evaluate", "runs/b", "data", "--out", "c"],
    ]
    assert len(collisions(calls)) == 1
    assert not collisions(calls[1:])
    assert collisions([["evaluate", "a", "d"], ["evaluate", "a", "d", "--dtype", "float16"]])
    assert collisions([["train", "ek100", "data.root=a"], ["train", "recipes/ek100.yaml", "data.root=b"]])
    assert not collisions([["train", "ek100", "..."], ["train", "ek100", "data.root=b"]])
    assert not collisions([["evaluate", "a", "d", "--out=x"], ["evaluate", "a", "d", "--out", "x", "--workers", "3"]])


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


#: What a writer leaves for a number or a paragraph to come: @NB, TODO, STATUS, QUICKRESULTS.
_MARK = re.compile(
    r"(?<![\w@/`.])@[A-Z][A-Z0-9]+\b|\b(?:TODO|TBD|FIXME|XXX)\b|^\W*(?!LICENSE|MANIFEST)[A-Z][A-Z_]{3,}\W*$", re.M
)


def marks(text: str) -> list[str]:
    """Marks in a document, its code left out."""
    return [hit.strip() for hit in _MARK.findall(re.sub(r"`[^`\n]+`", "", _FENCE.sub("", text)))]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.stem)
def test_a_document_has_no_mark_for_what_is_to_come(path: Path) -> None:
    assert marks(path.read_text()) == []


def test_marks_are_found() -> None:
    text = "| `a.py` | @NB |\n\nSTATUS\n\n**SITE**\n\nQUICKRESULTS\nIt takes TBD s.\n"
    assert marks(text) == ["@NB", "STATUS", "**SITE**", "QUICKRESULTS", "TBD"]
    assert marks("A CPU has AVX2, `@NB` and a GPU.\n```bash\nTODO\n```\n") == []


def test_the_recipe_of_each_row_is_in_the_study_s_table() -> None:
    text = (ROOT / "docs/study.md").read_text().split("## In full")[1].split("\n## ")[0]
    named = {word for line in text.splitlines() if line.startswith("| ") for word in re.findall(r"`([^`]+)`", line)}
    recipes = {path.stem for path in (ROOT / "recipes/rows").iterdir()}
    assert recipes <= named
    assert {word for word in named if not re.search(r"[.=/]", word)} == recipes


def program(name: str, folder: Path) -> Path:
    """A Python program of docs/reproduce.md as a file."""
    code = re.search(rf"^```python\n(# {name}\n.*?)^```", (ROOT / "docs/reproduce.md").read_text(), re.S | re.M)
    assert code is not None
    (folder / name).write_text(code[1])
    return folder / name


def run(*words: str | Path) -> list[str]:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_segments_get_the_names_of_the_official_list(tmp_path: Path) -> None:
    """EPIC-KITCHENS-100 names a segment by its narration, the official lists do by the same."""
    (tmp_path / "train.csv").write_text(
        "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,verb_class,all_nouns\n"
        "P01_01_0,P01,P01_01,00:00:01.089,00:00:00.14,00:00:03.37,3,\"['door', 'tap']\"\n"
        "P02_101_7,P02,P02_101,00:00:01.089,00:01:00.14,00:01:03.37,3,['door']\n"
    )
    (tmp_path / "P02_101_7.mp4").touch()
    (line,) = run(program("cut.py", tmp_path), "EPIC", tmp_path, tmp_path / "train.csv")
    words = shlex.split(line)
    assert "-ss 00:00:00.14 -to 00:00:03.37 -i EPIC/P01/videos/P01_01.MP4" in line
    assert (words[0], words[-1], words[-2]) == ("ffmpeg", f"{tmp_path}/P01_01_0.mp4", f"{tmp_path}/P01_01_0.mp4.part")


def test_kinetics_training_list_has_the_numbers_of_the_official_one(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("-a", "b"):
        (tmp_path / "train" / f"{name}.mp4").touch()
    (tmp_path / "val.csv").write_text("v.mp4 1\nlost.mp4 3\nw.mp4 0\n")
    header = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "validate.csv").write_text(f"{header}riding a bike,v,1,11,validate\nabseiling,w,1,11,validate\n")
    (tmp_path / "all.csv").write_text(
        f"{header}abseiling,-a,0,10,train\nriding a bike,b,0,10,train\nabseiling,c,0,10,train\n"
    )
    words = (program("kinetics.py", tmp_path), tmp_path / "validate.csv", tmp_path / "all.csv", tmp_path)
    assert run(*words) == []
    assert (tmp_path / "train.csv").read_text() == "-a.mp4 0\nb.mp4 1\n"
    (tmp_path / "val.csv").write_text("v.mp4 1\nw.mp4 0\n" + "w.mp4 2\n")
    with pytest.raises(subprocess.CalledProcessError):
        run(*words)
