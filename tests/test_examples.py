"""The examples that train: each runs as its docstring says, at a size for seconds, and really learns."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import cast

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    """The example as a module, loaded from its file: `examples/` is no package, as a user has it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def refused(main: object, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(words)  # type: ignore[operator]
    assert stopped.value.code == 2
    return capsys.readouterr().err


def imported(name: str) -> list[tuple[str, str]]:
    """Module and name of all that an example imports from our packages."""
    found = []
    for node in ast.walk(ast.parse((EXAMPLES / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            found += [(str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, word) for module, word in found if module.split(".")[0] in ("cast", "cast_kernels")]


@pytest.mark.parametrize("name", ["minimal_train", "exchange_for_any_two_vits"])
def test_an_example_needs_public_names_only(name: str) -> None:
    assert imported(name)
    for module, word in imported(name):
        assert not word or word in importlib.import_module(module).__all__, f"{module}.{word}"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_has_its_command_and_its_line(path: Path) -> None:
    text = path.read_text()
    assert f"python examples/{path.name}" in (ast.get_docstring(ast.parse(text)) or "")
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()
    assert not [(module, word) for module, word in imported(path.stem) if "._" in module or word.startswith("_")]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_helps(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        example(path.stem).main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert f"python examples/{path.name}" in said
    assert "options:" in said


def test_every_example_has_its_seconds() -> None:
    """The table's last column; what executes the notebook is in the notebook's row."""
    table = [line.strip("| ").split(" | ") for line in (EXAMPLES / "README.md").read_text().splitlines() if "|" in line]
    assert table[0][-1] == "seconds"
    rows = {row[0].strip("`"): row for row in table[2:]}
    assert rows.keys() == {p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".ipynb")} - {
        "execute_notebook.py"
    }
    assert [name for name, row in rows.items() if len(row) != 4 or not re.match(r"\d", row[-1])] == []


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    return example("minimal_train")


@pytest.mark.slow
def test_the_minimal_training_learns(minimal: ModuleType, tmp_path: Path) -> None:
    """On scans that it never saw. Chance is 25 percent of verbs, one deviation of 320 clips 2.4; nouns take longer."""
    accuracy = minimal.main(["--steps", "100", "--out", str(tmp_path)])
    assert accuracy["verb"] > 60
    model = cast.CAST.from_pretrained(tmp_path / "model")
    assert model.labels == {"verb": ["left", "right", "up", "down"], "noun": list("0123456789")}
    assert minimal.evaluate(model, 16) == accuracy


def test_a_minimal_training_that_was_resumed_ends_at_the_same_weights(
    minimal: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    monkeypatch.setattr(minimal, "evaluate", lambda model, batch: {})  # for seconds
    minimal.main(["--steps", "3", "--every", "2", "--out", str(whole)])
    with monkeypatch.context() as patch:
        patch.setattr(minimal, "make_clips", killed_at(2, minimal.make_clips))
        with pytest.raises(KeyboardInterrupt):
            minimal.main(["--steps", "3", "--every", "2", "--out", str(broken)])
    assert torch.load(broken / "checkpoint.pt")["steps"] == 2
    minimal.main(["--steps", "3", "--every", "2", "--out", str(broken), "--resume"])
    one, other = (cast.CAST.from_pretrained(out / "model").state_dict() for out in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_minimal_training_that_is_finished_says_so(
    minimal: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(minimal, "evaluate", lambda model, batch: {"verb": 25.0})
    words = ["--steps", "1", "--out", str(tmp_path)]
    minimal.main(words)
    capsys.readouterr()
    assert minimal.main([*words, "--resume"]) == {"verb": 25.0}
    assert capsys.readouterr().out == "already at step 1 of 1; scans that it never saw: verb 25.0 %\n"


def test_only_a_whole_checkpoint_of_the_same_training_is_resumed(
    minimal: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, words = tmp_path / "checkpoint.pt", ["--resume", "--out", str(tmp_path)]
    torch.save({"begun": "with --sizes small without --clip", "steps": 1}, checkpoint)
    said = refused(minimal.main, [*words, "--sizes", "published"], capsys)
    assert "was begun with --sizes small without --clip, not with --sizes published without --clip" in said
    assert "and --clip; resume it" in refused(minimal.main, [*words, "--clip", "a.pt", "--videomae", "b.pth"], capsys)
    whole = checkpoint.read_bytes()
    torch.save([torch.zeros(3)], checkpoint)
    for damaged in (b"", b"no checkpoint", whole[: len(whole) // 2], checkpoint.read_bytes()):
        checkpoint.write_bytes(damaged)
        assert "checkpoint.pt is no whole checkpoint of this example" in refused(minimal.main, words, capsys)


def killed_at(step: int, make_clips):
    def clips(scans, count, config, seed):
        if seed == step:
            raise KeyboardInterrupt
        return make_clips(scans, count, config, seed)

    return clips


def test_no_single_frame_of_the_minimal_training_tells_the_verb(minimal: ModuleType) -> None:
    """The mean picture of each direction is the same, so what a frame shows has nothing to do with it."""
    video, labels = minimal.make_clips(
        range(1300), 2000, cast.CASTConfig(num_frames=3, tubelet_size=1, image_size=16), 0
    )
    middle = [video[labels["verb"] == verb, 0, 1].mean(0) for verb in range(4)]
    assert max(float((picture - middle[0]).abs().max()) for picture in middle) < 0.25


def test_the_published_sizes_are_the_paper_s_model(minimal: ModuleType) -> None:
    with torch.device("meta"):
        model = cast.CAST(heads={"verb": 97, "noun": 300}, **minimal.SIZES["published"]["model"])
    config = model.config
    assert (config.embed_dim, config.depth, config.num_heads, config.image_size, config.num_frames) == (
        768,
        12,
        12,
        224,
        16,
    )


def test_the_minimal_training_refuses_bad_arguments(
    minimal: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "invalid choice: 'big'" in refused(minimal.main, ["--sizes", "big"], capsys)
    assert "--steps and --every must be at least 1" in refused(minimal.main, ["--steps", "0"], capsys)
    assert "--clip and --videomae come together" in refused(minimal.main, ["--clip", "a.pt"], capsys)
    (tmp_path / "damaged.pt").write_bytes(b"no weights")
    for name, fault in (("none.pt", "no such checkpoint"), ("damaged.pt", "damaged.pt")):
        clip, out = str(tmp_path / name), ["--out", str(tmp_path / "out")]
        assert fault in refused(minimal.main, ["--clip", clip, "--videomae", clip, *out], capsys)
    out = tmp_path / "damaged.pt"
    assert f"--out: {out} takes no files" in refused(minimal.main, ["--out", str(out)], capsys)
    assert f"there is no {tmp_path}" in refused(minimal.main, ["--resume", "--out", str(tmp_path)], capsys)
