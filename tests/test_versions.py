"""Which torch and Triton are refused, and that what the package promises is what was run."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cast_kernels import backends, versions
from cast_kernels.problem import Problem

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("package", "version", "refused"),
    [
        ("torch", "2.9.1+cu128", True),
        ("torch", "1.13.1", True),
        ("torch", "2.10.0", False),
        ("torch", "2.10.0a0+b4e4ee8", False),
        ("torch", "2.11.0+cu130", False),
        ("torch", "3.0", False),
        ("triton", "3.5.1", True),
        ("triton", "3.6.0", False),
        ("triton", "3.10.0", False),
        ("triton", "git", False),
    ],
)
def test_what_is_too_old_is_told_by_number(package: str, version: str, refused: bool) -> None:
    said = versions.too_old(package, version)
    assert bool(said) == refused
    if refused:
        needed = {"torch": "2.10", "triton": "3.6"}[package]
        assert said == (
            f"{package} {version} is too old: cast_kernels needs {needed} or newer; pip install '{package}>={needed}'"
        )


@pytest.mark.parametrize(("version", "status"), [("2.9.1", 1), ("2.10.0", 0)])
def test_an_old_torch_is_refused_at_import(version: str, status: int) -> None:
    code = f"import torch; torch.__version__ = torch.torch_version.TorchVersion({version!r}); import cast_kernels"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert ("ImportError: torch 2.9.1 is too old" in done.stderr) == bool(status)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_an_old_triton_is_a_verdict(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # what takes tensors of the CPU
    old = ModuleType("triton")
    old.__version__ = "3.5.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", old)
    problem = Problem(1, 8, 196, 768, 384, 12, "time", "space", torch.float32, device)
    verdict = backends.can_run("triton", problem)
    assert not verdict.ok
    assert "triton 3.5.1 is too old: cast_kernels needs 3.6 or newer; pip install 'triton>=3.6'" in verdict.reason
    with pytest.raises(backends.BackendError, match=r"needs 3\.6 or newer"):
        backends.select("triton", problem)


@pytest.mark.parametrize(("version", "caution"), [("3.6.0", True), ("3.7.0", True), ("3.7.1", False), ("4.0", False)])
def test_a_triton_without_fences_says_so(version: str, caution: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ModuleType("triton")
    found.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", found)
    verdict = backends.can_run("triton", Problem(1, 8, 196, 768, 384, 12, "time", "space", torch.float32, "cuda"))
    assert verdict.ok
    assert verdict.reason.startswith(f"Triton {version}")
    assert ("leaves out fences" in verdict.reason) == caution


def test_the_package_asks_pip_for_the_torch_that_it_asks_for_at_import() -> None:
    oldest = ".".join(map(str, versions.OLDEST["torch"]))
    assert f"torch>={oldest}" in PROJECT["dependencies"]


def test_what_is_promised_stands_in_the_table() -> None:
    """A Python of the classifiers, and the oldest torch and Triton, have a row in docs/versions.md that says so."""
    lines = (ROOT / "docs/versions.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| 3")]
    pythons = {".".join(row[0].split(".")[:2]) for row in rows}
    classified = set(re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"])))
    assert classified == pythons
    assert PROJECT["requires-python"] == f">={min(pythons, key=lambda x: int(x[2:]))}"
    for column, package in ((1, "torch"), (2, "triton")):
        found = {tuple(map(int, row[column].split(".")[:2])) for row in rows}
        assert min(found) == versions.OLDEST[package]
