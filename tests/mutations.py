"""Deliberate faults, each of which must make a test fail: the proof that the tests can fail.

    python tests/mutations.py            # all, 10 to 60 seconds each
    python tests/mutations.py residual   # those whose name contains the word
    python tests/mutations.py --list

Each fault is a few exact text replacements. They are made in a copy of the tree; the copy is built and tested; a
fault that no test notices has survived. The exit status is 1 if one survives, or if a text that should be replaced is
not there (exactly once) any more, or if the tests fail without any fault.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import FAULTS
from faults.base import BUILDS, Fault

ROOT = Path(__file__).parent.parent


def apply(fault: Fault, tree: Path) -> dict[Path, str]:
    """Make the fault in `tree`; returns the former contents of the files changed.

    Raises:
        LookupError: a text to replace is not there exactly once.
    """
    before: dict[Path, str] = {}
    for name, text, replacement in fault.edits:
        path = tree / name
        content = path.read_text()
        before.setdefault(path, content)
        if content.count(text) != 1:
            for changed, former in before.items():
                changed.write_text(former)
            raise LookupError(f"{name} holds {text!r} {content.count(text)} times, not once")
        path.write_text(content.replace(text, replacement))
    return before


def copy_tree(to: Path) -> None:
    """What building and testing needs, with the built Python module."""
    useless = shutil.ignore_patterns("__pycache__", ".git")
    for name in ("benchmarks", "cast", "cast_kernels", "csrc", "docs", "recipes", "tests", "tools"):
        shutil.copytree(ROOT / name, to / name, ignore=useless)
    for name in ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, to)


def call(command: list[str], tree: Path) -> tuple[bool, str]:
    """Whether the command succeeded in the tree, and what it said."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return False, "no end within 300 s"
    return done.returncode == 0, done.stdout + done.stderr


def passes(noticed_by: str, tree: Path) -> tuple[bool, str]:
    """Whether the tests pass in the tree, and the line that says why not.

    Raises:
        RuntimeError: the tree cannot be built.
    """
    if noticed_by not in BUILDS:
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        good, text = call([*pytest, *noticed_by.split()], tree)
        return good, next((x for x in reversed(text.splitlines()) if x.startswith(("FAILED", "ERROR"))), text[-200:])
    build = tree / "build" / noticed_by
    if not build.exists():
        options = ["-DCAST_KERNELS_NATIVE_TESTS=ON", "-DCAST_KERNELS_LEVELS=baseline", *BUILDS[noticed_by]]
        good, text = call(["cmake", "-G", "Ninja", "-S", str(tree), "-B", str(build), *options], tree)
        if not good:
            raise RuntimeError(text[-2000:])
    good, text = call(["cmake", "--build", str(build)], tree)
    if not good:
        raise RuntimeError(text[-2000:])
    good, text = call([str(build / "tests/native/native_tests"), "--few", "--repeats", "3"], tree)
    signs = ("FAIL", "WARNING: ThreadSanitizer", "==ERROR", "runtime error", "ERROR: AddressSanitizer")
    return good, next((x for x in text.splitlines() if any(sign in x for sign in signs)), text[-200:])


def judge(fault: Fault, tree: Path) -> tuple[str, str]:
    """What became of the fault, and the sign of it."""
    try:
        before = apply(fault, tree)
    except LookupError as error:
        return "no longer applies", str(error)
    try:
        good, sign = passes(fault.noticed_by, tree)
        return ("SURVIVED", "") if good else ("killed", sign)
    except RuntimeError as error:
        return "does not build", str(error)
    finally:
        for path, content in before.items():
            path.write_text(content)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print the names only")
    given = parser.parse_args(arguments)
    chosen = [f for f in FAULTS if not given.words or any(word in f.name for word in given.words)]
    if given.list:
        print("\n".join(f.name for f in chosen))
        return 0
    if not chosen:
        parser.error(f"no fault's name contains {' or '.join(given.words)}")
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        for noticed_by in dict.fromkeys(f.noticed_by for f in chosen):
            good, sign = passes(noticed_by, tree)
            if not good:
                print(f"the tests fail without any fault ({noticed_by}): {sign}")
                return 1
        for one in chosen:
            start = time.monotonic()
            verdict, sign = judge(one, tree)
            bad += verdict != "killed"
            by, seconds = one.noticed_by.split()[0], time.monotonic() - start
            print(f"{verdict:<9} {one.name:<52} {by:<22} {seconds:4.0f} s  {sign[:150]}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} faults killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
