"""The native core without Python: its own test program, plain, under sanitizers, and for another processor.

`tests/native/` holds the program: guard bands, poisoned memory, every result against plain loops in double, repeats,
several callers at once. Here it is built and run.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from levels import LEVELS

ROOT = Path(__file__).parent.parent

#: The end of what the program says when every check held.
ALL_HELD = " checks, 0 failed"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"),
]


def tool(name: str) -> str:
    """The program's path: on PATH, or beside this interpreter, where pip puts it."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"needs {name}; pip install cmake ninja")
    return found


def build(folder: Path, *options: str) -> Path:
    """Configure and build `native_tests`; skips where the compiler cannot link what the options ask for."""
    configure = [tool("cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-S", str(ROOT)]
    configure += ["-B", str(folder), "-DCAST_KERNELS_NATIVE_TESTS=ON", *options]
    for command in (configure, [tool("cmake"), "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "tests/native/native_tests"


def run(program: Path, *arguments: str, before: tuple[str, ...] = (), level: str) -> str:
    """What the program says at the level; fails unless it ran there to its end."""
    # Three threads on two processors would otherwise spend their time waiting actively for each other.
    environment = os.environ | {"CAST_KERNELS_CPU_ISA": level, "OMP_WAIT_POLICY": "passive"}
    command = [*before, str(program), "--level", level, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def usable(level: str) -> bool:
    """Whether this processor runs the level."""
    from cast_kernels import _native

    return _native.CORE is not None and LEVELS.index(level) <= LEVELS.index(_native.ISA)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    levels = ["baseline", *(level for level in LEVELS[1:] if usable(level))]
    return build(tmp_path_factory.mktemp("plain"), f"-DCAST_KERNELS_LEVELS={';'.join(levels)}")


@pytest.mark.parametrize("level", LEVELS)
def test_the_core_holds_at_every_level(plain: Path, level: str) -> None:
    if not usable(level):
        pytest.skip(f"this processor does not run {level}")
    assert ALL_HELD in run(plain, level=level)


def sanitizer(name: str, folder: Path) -> Path:
    """A build with GCC's or Clang's sanitizer; skips where a one-line program cannot be built and run with it."""
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() { return 0; }\n")
    compiler = os.environ.get("CXX", "c++")
    for command in ([compiler, f"-fsanitize={name}", str(source), "-o", str(program)], [str(program)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            pytest.skip(f"{compiler} -fsanitize={name} does not work here: {done.stderr.strip()[:200]}")
    # One level is enough of a test of memory and order, and half the time to build: the best one that runs here.
    levels = "baseline;avx2" if usable("avx2") else "baseline"
    return build(folder / "build", f"-DCAST_KERNELS_SANITIZE={name}", f"-DCAST_KERNELS_LEVELS={levels}")


def best() -> str:
    return "avx2" if usable("avx2") else "baseline"


def test_no_address_or_behaviour_is_undefined(tmp_path: Path) -> None:
    assert ALL_HELD in run(sanitizer("address,undefined", tmp_path), "--repeats", "1", level=best())


def test_no_data_race(tmp_path: Path) -> None:
    """Tasks run on std::thread here: ThreadSanitizer does not see the barriers of GCC's OpenMP (csrc/cpu/threads.h)."""
    assert ALL_HELD in run(sanitizer("thread", tmp_path), "--few", "--repeats", "3", level=best())


@pytest.mark.skipif(platform.machine() == "aarch64", reason="the baseline of this processor is NEON already")
def test_the_aarch64_baseline_holds_in_emulation(tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user-static)")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
    program = build(tmp_path, *target)
    emulated = (emulator, "-L", "/usr/aarch64-linux-gnu")
    assert ALL_HELD in run(program, "--few", "--repeats", "2", before=emulated, level="baseline")
