"""Runs the part of the tests that a version of Python, torch or Triton can break, with versions of your choice.

    python tests/versions.py torch==2.11.0 triton==3.6.0 torchvision==0.26.0 --python python3.12
    python tests/versions.py --venv DIR      # with what is installed in DIR already

A virtual environment is made, the package is built and installed from a copy of the tree, and PART is run there. The
last line is a row for the table of docs/versions.md. The exit status is pytest's.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: Ops, torch.compile, export, training; Triton's launches, compiler, interpreter and emulation; build and import.
PART = {
    "ops": (
        "bcast",
        "ffn",
        "self_attention",
        "adapter",
        "attention",
        "golden",
        "changing_weights",
        "derivatives",
        "plain",
    ),
    "model": ("model", "positions", "experts", "export", "training_engine", "training_checkpoints"),
    "triton": ("triton_launches", "offline_driver", "compile_gates", "emulated_launches", "triton_interpreter"),
    "build": ("info", "versions", "build_flags"),
}

_VERSIONS = """
import platform, torch, triton
print("|", platform.python_version(), "|", torch.__version__, "|", triton.__version__, "|", end=" ")
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirements", nargs="*", help="what pip installs besides the package, e.g. torch==2.11.0")
    parser.add_argument("--python", default=sys.executable, help="the Python of a new environment")
    parser.add_argument("--venv", type=Path, help="an environment that has all requirements; nothing is installed")
    parser.add_argument("--part", nargs="*", choices=PART, default=list(PART))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        built = shutil.ignore_patterns(".*", "*.so", "_build.json", "__pycache__", "build", "*.egg-info")
        shutil.copytree(ROOT, tree, ignore=built)
        python = str((options.venv or Path(folder) / "venv").absolute() / "bin/python")
        if options.venv is None:
            _run([options.python, "-m", "venv", str(Path(folder) / "venv")], tree)
            _run([python, "-m", "pip", "install", "-q", f"{tree}[test]", *options.requirements], tree)
        _run([python, "setup.py", "-q", "build_ext", "--inplace"], tree)
        done = subprocess.Popen(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_files(options.part)], cwd=tree,
            env=_environment(tree, python), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert done.stdout is not None
        last = ""
        for line in done.stdout:
            print(line, end="", flush=True)
            last = line
        status = done.wait()
        versions = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=True).stdout
        print(versions + re.sub(r" in [\d.]+s.*", "", last.strip(" =\n")), "|", ", ".join(options.part), "|")
    return status


def _files(parts: list[str]) -> list[str]:
    return [f"tests/test_{name}.py" for part in parts for name in PART[part]]


def _environment(tree: Path, python: str) -> dict[str, str]:
    """The copy's modules and the environment's programs come first."""
    found = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tools")])}
    return found | {"PATH": os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])}


def _run(command: list[str], tree: Path) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, cwd=tree, env=_environment(tree, command[0]), check=True)


if __name__ == "__main__":
    raise SystemExit(main())
