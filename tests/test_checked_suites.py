"""`pytest --ptx-target`: a finding fails the test that launched it, and without the option nothing is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
SUITE = """
import pytest, torch, triton, triton.language as tl

@triton.jit
def moved(x, y, n, OFF: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + OFF, mask=at < n) + 1, mask=at < n)

def move(n, off):
    x = torch.arange(n, dtype=torch.float32)
    y = torch.zeros(n)
    moved[(triton.cdiv(n, 128),)](x, y, n, OFF=off, BLOCK=128)
    return x, y
"""


def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, code: str, *words: str) -> pytest.RunResult:
    """The suite in a process of its own, with the plugin as an installation registers it."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tools"))
    pytester.makepyfile(test_suite=SUITE + code)
    return pytester.runpytest_subprocess("-p", "ptx_emulator_pytest", "-p", "no:cacheprovider", *words)


def test_a_finding_fails_its_test_and_no_other(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
def test_right():
    x, y = move(300, 0)
    assert torch.equal(y, x + 1)

def test_silent():
    move(300, 1)

def test_wrong():
    assert move(300, 1) is None

def test_skipped():
    move(300, 1)
    pytest.skip("later")

@pytest.fixture
def made():
    return move(300, 1)

def test_prepared(made): ...

@pytest.mark.xfail(strict=True)
def test_expected():
    move(300, 1)
"""
    ran = run(pytester, monkeypatch, code, "--ptx-target", "sm_90")
    ran.assert_outcomes(passed=1, failed=3, errors=1, xfailed=1)
    ran.stdout.fnmatch_lines([
        "ptx_emulator: kernels are compiled for sm_90 and executed on the CPU",
        "*_ test_silent _*",
        "MemoryFault in moved",
        "  global access of 4 bytes at * lies outside every buffer (byte 1200 of 'x', which has 1200)*test_suite.py:6)",
        "  launched by test_suite.py:11 in move from test_suite.py:19 in test_silent",
        "*_ test_wrong _*",
        "E *assert*",
        "-* Captured ptx_emulator call -*",
        "MemoryFault in moved",
        "1 kernel, 6 launches on sm_90: 5 findings",
    ])  # fmt: skip


def test_the_options_reach_the_checker_and_every_phase_is_watched(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
tuned = triton.autotune([triton.Config({"BLOCK": n}) for n in (64, 128)], key=["n"])(moved)

@pytest.fixture
def ended():
    yield
    move(300, 1)

def test_options(request, ended):
    checker = request.config.pluginmanager.get_plugin("ptx_emulator_suite").checker
    assert (checker.target.name, checker.landing, checker.seed, checker.all_configs) == ("sm_80", "random", 5, True)
    assert (checker.lane_order, checker.engine) == (True, "interpreter")
    tuned[(1,)](torch.ones(64), torch.zeros(64), 64, OFF=0)
"""
    words = ("--ptx-target", "sm_80", "--ptx-landing", "random", "--ptx-seed", "5")
    ran = run(pytester, monkeypatch, code, *words, "--ptx-all-configs", "--ptx-lane-order")
    ran.assert_outcomes(passed=1, errors=1)
    ran.stdout.fnmatch_lines([
        "*ERROR at teardown of test_options*",
        "MemoryFault in moved",
        "1 kernel, 4 launches on sm_80: 1 finding",
        "note: moved is autotuned over 2 configurations: each was executed once*",
    ])  # fmt: skip


def test_the_interpreter_is_refused(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ran = run(pytester, monkeypatch, "def test_it(): ...\n", "--ptx-target", "sm_80")
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    assert "TRITON_INTERPRET is set" in ran.stderr.str()


def test_a_launch_of_a_module_is_an_error_of_its_collection(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(pytester, monkeypatch, "move(300, 1)\ndef test_it(): ...\n", "--ptx-target", "sm_80")
    ran.assert_outcomes(errors=1)
    ran.stdout.fnmatch_lines(["MemoryFault in moved"])


def test_processes_of_xdist_have_it_each(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "@pytest.mark.parametrize('off', [0, 1])\ndef test_it(off):\n    move(300, off)\n"
    ran = run(pytester, monkeypatch, code, "--ptx-target", "sm_80", "-n", "2")
    ran.assert_outcomes(passed=1, failed=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ptx-target", "sm_70"), "invalid choice: 'sm_70'"),
        (("--ptx-target", "sm_90", "--ptx-landing", "random"), "draws from a seed: add --ptx-seed 0"),
    ],
)
def test_bad_usage_is_refused(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    ran = run(pytester, monkeypatch, "def test_it(): ...\n", *words)
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    assert said in ran.stderr.str()


def test_without_the_option_nothing_is_imported() -> None:
    """Only the module with the options, which pytest imports for every suite."""
    code = (
        "import sys, pytest, numpy\n"
        "sys.exit(pytest.main(['-q', '-p', 'ptx_emulator_pytest', '-p', 'no:cacheprovider', '--co', 'nowhere']) and 0\n"
        "  or sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'triton', 'ptx_emulator')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT / "tools")}, cwd="/", text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == "ERROR: file or directory not found: nowhere\n\n[]\n"


def test_an_installation_registers_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"ptx_emulator_pytest": "ptx_emulator_pytest"}
