"""The C++ sources are as clang-format leaves them, by the version that pyproject.toml names and `.clang-format`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("csrc", "csrc/cpu", "csrc/cuda", "csrc/ptx", "tests/native")
    for path in sorted((ROOT / folder).glob("*.[ch]*"))
    if path.suffix != ".cmake"
]


def complaints(*sources: Path) -> str:
    """What clang-format would change, as it says it; the program is the one beside this Python, where pip puts it."""
    beside = str(Path(sys.executable).parent)
    program = shutil.which("clang-format", path=beside) or shutil.which("clang-format")
    assert program, "clang-format is missing: pip install -e '.[test]'"
    style = f"--style=file:{ROOT / '.clang-format'}"
    done = subprocess.run([program, style, "--dry-run", "-Werror", *map(str, sources)], capture_output=True, text=True)
    assert bool(done.stderr) == bool(done.returncode)
    return done.stderr


def test_the_sources_are_formatted() -> None:
    assert len(SOURCES) > 40
    assert not complaints(*SOURCES)


def test_what_is_not_is_named(tmp_path: Path) -> None:
    crooked = tmp_path / "crooked.h"
    crooked.write_text("int  f( int x ){return x;}\n")
    assert f"{crooked}:1:" in complaints(crooked)
