"""Whoever imports the packages finds a known type behind every public name: what `basedpyright --verifytypes` says.

basedpyright rather than pyright: its wheel holds the checker and depends on a wheel of Node, where pyright's downloads
both at its first run. Types of packages that declare none (Triton, accelerate) count as theirs, not ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def verify(package: str, folder: Path) -> dict[str, Any]:
    """The report on a package that lies in the folder."""
    command = [sys.executable, "-m", "basedpyright", "--verifytypes", package, "--ignoreexternal", "--outputjson"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tools")])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    assert not report["generalDiagnostics"], report["generalDiagnostics"]
    assert Path(report["typeCompleteness"]["packageRootDirectory"]) == folder / package
    return report["typeCompleteness"]


def faults(report: dict[str, Any]) -> list[str]:
    """A line for each thing that is wrong: where, which name, what."""
    lines = []
    for symbol in report["symbols"]:
        for found in symbol["diagnostics"]:
            if found["severity"] == "error":
                where = f"{found['file']}:{found['range']['start']['line'] + 1}: " if "range" in found else ""
                lines.append(f"{where}{symbol['name']}: {' '.join(found['message'].split())}")
    return sorted(set(lines))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "folder"), [("cast", ROOT), ("cast_kernels", ROOT), ("ptx_emulator", ROOT / "tools")]
)
def test_every_public_name_has_a_known_type(package: str, folder: Path) -> None:
    report = verify(package, folder)
    assert not faults(report), "\n".join(["not all public types are known:", *faults(report)])
    assert report["completenessScore"] == 1
    assert report["exportedSymbolCounts"]["withKnownType"] > 1000, "it looked at next to nothing"


def test_a_name_without_a_type_is_found(tmp_path: Path) -> None:
    package = tmp_path / "loose"
    package.mkdir()
    (package / "py.typed").touch()
    (package / "__init__.py").write_text("class Loose:\n    def __init__(self) -> None:\n        self.rows = [1]\n")
    (fault,) = faults(verify("loose", tmp_path))
    assert fault.startswith(f"{package / '__init__.py'}:3: loose.Loose.rows: Type is missing type annotation")
