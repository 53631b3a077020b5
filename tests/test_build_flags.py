"""What CXXFLAGS and LDFLAGS may not do: change values, the process's denormals, or the oldest processor that works.

Called as a script, it prints what the native core of the package on its path computes, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cast_kernels import _native, info

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "c++")

#: Every way to ask for arithmetic that is not IEEE's, by itself and as a part; and for this very processor.
FAST = (
    "-ffast-math -funsafe-math-optimizations -fassociative-math -freciprocal-math -ffinite-math-only -fno-signed-zeros"
    " -fno-trapping-math -Ofast"
)

NATIVE = "-march=native" if os.uname().machine == "x86_64" else ""

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler")


def call(command: list[str], **variables: str) -> str:
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def measure() -> dict[str, object]:
    """Which core runs, and what is left of small numbers; fails where a tensor's error is over twice eager's."""
    import bcast_cases
    import ffn_cases
    import self_attention_cases

    for module in (bcast_cases, ffn_cases, self_attention_cases):
        for case in module.CASES[:4]:
            exact = module.run(case, torch.float64, None)
            ours, eager = (module.run(case, torch.float32, backend) for backend in ("cpu", "eager"))
            bcast_cases.assert_at_most_twice_eager(ours, eager, exact)
    small = torch.tensor([1e-40]) * torch.tensor([1.0])
    return {"core": str(_native.CORE.__file__), "float32": small.item(), "float64": 1e-320 * small.numel()}


def configure(folder: Path, **flags: str) -> tuple[str, ...]:
    """Make the build of the core's baseline in a folder; returns the command that builds."""
    import pybind11

    beside = Path(sys.executable).parent
    cmake, ninja = (shutil.which(name) or str(beside / name) for name in ("cmake", "ninja"))
    command = [
        cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", str(ROOT), "-B", str(folder),
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DCAST_KERNELS_LEVELS=baseline", "-DCAST_OPTIMISE=-O1",
    ]  # fmt: skip
    call(command, **flags)
    return cmake, "--build", str(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The core, built at its baseline with all of FAST in CXXFLAGS and LDFLAGS, in a copy of the package."""
    folder = tmp_path_factory.mktemp("fast")
    compiled = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(ROOT / "cast_kernels", folder / "cast_kernels", ignore=compiled)
    flags = {"CXXFLAGS": f'{FAST} {NATIVE} -DWORDS="\\"two words\\""', "LDFLAGS": FAST}
    call([*configure(folder / "build", **flags)], **flags)
    (module,) = (folder / "build").glob("_C*.so")
    shutil.copy2(module, folder / "cast_kernels")
    return folder


@needs_compiler
@pytest.mark.parametrize("flags", [FAST, NATIVE], ids=["fast math", "this processor"])
def test_the_build_takes_back(flags: str, tmp_path: Path) -> None:
    """A file that includes the refusals below compiles; the tests behind this one build and run all files."""
    build = configure(tmp_path, CXXFLAGS=flags, LDFLAGS=flags)
    call([*build, "--target", "CMakeFiles/_C.dir/csrc/cpu/dispatch.cpp.o"], CXXFLAGS=flags)


@needs_compiler
@pytest.mark.slow
def test_fast_math_changes_neither_values_nor_denormals(built: Path) -> None:
    path = os.pathsep.join([str(built), str(ROOT / "tests")])
    told = json.loads(call([sys.executable, __file__], PYTHONPATH=path))
    assert Path(told["core"]).is_relative_to(built)
    assert told["float32"] == pytest.approx(1e-40, rel=1e-4)
    assert told["float64"] == 1e-320


@needs_compiler
@pytest.mark.slow
def test_the_record_says_which_flags_the_build_saw(built: Path) -> None:
    record = json.loads((built / "build/parts.json").read_text())
    assert FAST in record["compiler_flags"]
    assert '-DWORDS="\\"two words\\""' in record["compiler_flags"]
    assert FAST in record["linker_flags"]
    assert "-fno-fast-math" in record["appended_flags"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="reads x86-64 code")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump to read code")
def test_this_processors_instructions_do_not_leak_into_the_baseline(built: Path) -> None:
    """A module that was built with -march=native must load, and choose, on the oldest processor."""
    (module,) = (built / "cast_kernels").glob("_C*.so")
    code = call(["objdump", "-d", "--no-show-raw-insn", str(module)])
    assert "xmm" in code
    assert not [line for line in code.splitlines() if "ymm" in line or "zmm" in line or "\tvmov" in line]


@needs_compiler
@pytest.mark.parametrize(
    "flags", ["-ffast-math", "-Ofast", "-ffinite-math-only", "-funsafe-math-optimizations", "-freciprocal-math"]
)
def test_the_kernels_do_not_compile_with_fast_math(flags: str) -> None:
    """Where another build than CMakeLists.txt forgets to take it back. Clang names the first three only."""
    source = str(ROOT / "csrc/cpu/base.h")
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-x", "c++", source]
    call(command)
    macros = call([COMPILER, *flags.split(), "-dM", "-E", "-x", "c++", "/dev/null"])
    if not any(name in macros for name in ("__FAST_MATH__", "__FINITE_MATH_ONLY__ 1", "_MATH__ 1")):
        pytest.skip(f"{COMPILER} has no macro for {flags}")
    done = subprocess.run([*command, *flags.split()], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "the kernels need IEEE arithmetic" in done.stderr


@needs_compiler
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="an option of x86-64")
def test_what_chooses_the_level_does_not_compile_for_a_newer_processor() -> None:
    command = [COMPILER, "-std=c++17", "-fsyntax-only", str(ROOT / "csrc/cpu/dispatch.cpp")]
    call(command)
    for flag in ("-mbmi2", "-mpopcnt", "-mavx2"):
        done = subprocess.run([*command, flag], capture_output=True, text=True, timeout=60)
        assert done.returncode != 0, flag
        assert "must run on every x86-64 processor" in done.stderr


def test_info_shows_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"compiler_flags": "-Ofast -DNDEBUG", "linker_flags": "", "appended_flags": "-fno-fast-math"}
    monkeypatch.setattr(_native, "RECORD", {"cpu": {"built": True, "levels": ["baseline"], "openmp": True} | flags})
    monkeypatch.setattr(_native, "CORE", object())
    table = info.render(info.collect())
    rows = dict(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert rows["  flags"] == "compiler -Ofast -DNDEBUG; linker none; appended -fno-fast-math"
    monkeypatch.setattr(_native, "RECORD", {"cpu": {"built": True}})
    assert dict(zip(*(list(c.cells) for c in info.render(info.collect()).columns), strict=True))["  flags"] == (
        "not recorded"
    )


if __name__ == "__main__":
    print(json.dumps(measure()))
