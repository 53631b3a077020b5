"""The command `cast-kernels`: choices, exit codes, one clear line when something is missing."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
from ptx_emulator import targets
from ptx_emulator.native import library

from cast_kernels import cli
from cast_kernels.evidence import compile, emulate, mutant_table, predict, problems, whole_model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """What the commands call, instead of running it."""
    made: list[tuple[str, tuple[Any, ...]]] = []
    for module in (compile, emulate, mutant_table):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "main", lambda *a, name=name: made.append((name, a)) or 0)
    return made


def test_compile_gets_its_options(calls: list[Any]) -> None:
    assert cli.main(["compile"]) == 0
    more = ["--target", "sm_89", "--dtype", "fp16", "bf16", "--problems", "all", "--json", "x.json", "--cache", "c"]
    assert cli.main(["compile", *more]) == 0
    assert calls == [
        ("compile", (problems.GATED, ("bf16", "fp16", "fp32", "amp"), "paper", None, None)),
        ("compile", (["sm_89"], ["fp16", "bf16"], "all", Path("x.json"), Path("c"))),
    ]


def test_emulate_gets_its_options(calls: list[Any]) -> None:
    assert cli.main(["emulate"]) == 0
    assert cli.main(["emulate", "--target", "sm_90", "--size", "paper", "--dtype", "fp32", "--engine", "native"]) == 0
    assert cli.main(["emulate", "--mutants", "--target", "sm_80"]) == 0
    assert cli.main(["emulate", "--mutants", "--dtype", "fp16", "--engine", "native", "--every", "4"]) == 0
    assert cli.main(["emulate", "--mutants", "--dtype", "fp32", "--planted", "exchange", "long windows"]) == 0
    assert calls == [
        ("emulate", (["sm_80", "sm_90"], ["amp", "bf16"], "small", None, None)),
        ("emulate", (["sm_90"], ["fp32"], "paper", None, "native")),
        ("mutant_table", (["sm_80"], ["amp", "bf16"], None, None, 1, None)),
        ("mutant_table", (["sm_80", "sm_90"], ["fp16"], None, "native", 4, None)),
        ("mutant_table", (["sm_80", "sm_90"], ["fp32"], None, None, 1, ["exchange", "long windows"])),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "--target", "sm_70"], "sm_80"),
        (["compile", "--dtype", "int8"], "bf16"),
        (["emulate", "--target", "sm_100"], "sm_90"),
        (["emulate", "--size", "huge"], "paper"),
        (["predict", "--batch", "0"], "'0' is not a whole number above zero"),
        (["predict", "--batch", "1", "six"], "'six' is not a whole number above zero"),
        (["compile", "--prob", "step"], "--prob"),
        (["compiel"], "invalid choice"),
        ([], "COMMAND"),
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_failed_gate_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "main", lambda *_: 1)
    assert cli.main(["compile"]) == 1


def test_something_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(*_: object) -> int:
        raise ModuleNotFoundError("the PTX emulator is not there")

    monkeypatch.setattr(emulate, "main", missing)
    assert cli.main(["emulate"]) == 1
    assert capsys.readouterr().err == "cast-kernels emulate: error: the PTX emulator is not there\n"


def test_a_machine_that_is_not_built_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where there is none, and where what is there does not load."""
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    library.library.cache_clear()
    try:
        for words in ("there is none in", "which does not load"):
            assert cli.main(["emulate", "--engine", "native", "--target", "sm_80", "--dtype", "bf16"]) == 1
            said = capsys.readouterr().err
            assert said.startswith("cast-kernels emulate: error: engine='native' needs the vector machine"), said
            assert words in said
            assert "CAST_KERNELS_BUILD_CPU=1 pip install" in said
            assert said.count("\n") == 1
            (tmp_path / f"_machine{EXTENSION_SUFFIXES[0]}").write_text("no library")
    finally:
        library.library.cache_clear()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_only_pytorch_and_rich_are_needed_to_ask_for_information() -> None:
    """A bare machine with a GPU has no jsonargparse."""
    program = (
        "import sys; sys.modules['jsonargparse'] = sys.modules['docstring_parser'] = sys.modules['av'] = None"
        "\nfrom cast_kernels import cli; raise SystemExit(cli.main(['info', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '"torch"' in done.stdout


def test_the_architectures_of_the_commands_are_the_emulators() -> None:
    assert tuple(targets.TARGETS) == problems.COMPILED
    assert targets.EMULATED == problems.EMULATED
    assert set(problems.GATED) < set(problems.COMPILED)


def test_help_does_not_load_the_tools() -> None:
    """Names of choices come from where they are used, which loads neither what compiles nor what runs or prints."""
    tools = {f"cast_kernels.evidence.{name}" for name in ("compile", "emulate", "predict")}
    tools |= {"cast_kernels.gpu", "cast_kernels.triton.tiles", "ptx_emulator", "rich"}
    program = (
        "import sys; from cast_kernels import cli"
        f"\ntry: cli.main(['compile', '--help'])\nfinally: assert not {tools} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "gfx942" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "--kind", "fp16"], "--model is of autocast to bf16 alone; leave out --kind fp16"),
        (["--model", "--emulate"], "--model emulates nothing; leave out --emulate"),
        (["--streams", "bf16"], "--streams is of the whole model's residual streams; add --model"),
    ],
)
def test_an_option_that_predict_would_ignore_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (predict, whole_model):
        monkeypatch.setattr(module, "main", lambda *_: pytest.fail("begun"))
    assert cli.main(["predict", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_emulate_refuses_an_option_of_planted_faults_alone(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["emulate", "--every", "4"]) == 2
    assert "--every is of planted faults; add --mutants" in capsys.readouterr().err
    assert cli.main(["emulate", "--planted", "ffn"]) == 2
    assert "--planted is of planted faults; add --mutants" in capsys.readouterr().err
    assert calls == []


def test_predict_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []
    for module in (predict, whole_model):
        monkeypatch.setattr(module, "main", lambda *arguments: made.append(arguments) or 0)
    assert cli.main(["predict", "--device", "H100", "--batch", "6", "--emulate"]) == 0
    assert cli.main(["predict", "--device", "H100", "--kind", "fp16"]) == 0
    assert cli.main(["predict", "--model", "--kind", "amp", "--device", "H100", "--batch", "6"]) == 0
    assert cli.main(["predict", "--model", "--streams", "bf16", "--device", "H100"]) == 0
    assert made == [
        (["H100"], [6], None, None, None, True, "nothing", "amp"),
        (["H100"], [1, 6, 32], None, None, None, False, "nothing", "fp16"),
        (["H100"], [6], None, None, None, "nothing", ("fp32", "bf16")),
        (["H100"], [1, 6, 32], None, None, None, "nothing", ["bf16"]),
    ]


def test_the_package_is_the_command_where_none_is_installed() -> None:
    done = subprocess.run([sys.executable, "-m", "cast_kernels", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "gpu-check" in done.stdout
