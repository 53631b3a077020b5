"""The debug build of the CUDA kernels: a wait that never ends is told and traps. What ships has none of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_cases import needs_kernels

from cast_kernels import _native
from cast_kernels.evidence.cuda_modules import modules

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc/cuda"
NVCC = Path(_native.RECORD.get("cuda", {}).get("nvcc", "no/nvcc"))

pytestmark = needs_kernels
needs_compiler = pytest.mark.skipif(not NVCC.is_file(), reason=f"there is no {NVCC}")


def test_what_ships_neither_reads_the_time_nor_traps() -> None:
    assert not _native.cuda().told_waits()
    for text in modules().values():
        assert "globaltimer" not in text
        assert not re.search(r"\btrap;", text)


#: The waits as they would be if there were no watchdog.
BARE = """#pragma once
#include <cstdint>
#ifdef __CUDACC__
#include "ptx.cuh"
#endif
namespace cast::cuda {
enum class Awaited : std::uint32_t { full, empty, read, incoming };
struct Source {};
#define CAST_CALLER Source{}
struct Watched {};
#ifdef __CUDACC__
CAST_DEVICE void watch(const Watched&) {}
CAST_DEVICE void wait(uint64_t* barrier, uint32_t parity, Awaited, int, Source = {}) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}
CAST_DEVICE void wait_cluster(uint64_t* barrier, uint32_t parity, Awaited, int, Source = {}) {
  while (!mbarrier_try_wait_cluster(barrier, parity)) {
  }
}
#endif
}  // namespace cast::cuda
"""


def instructions(folder: Path, stem: str) -> list[str]:
    """What nvcc makes of a kernel's source, without lines of sources and debuggers' sections."""
    ptx = folder / f"{stem}.ptx"
    command = [str(NVCC), "-ptx", "-arch=compute_90a", "-O3", "-std=c++17", f"{folder / stem}.cu", "-o", str(ptx)]
    subprocess.run(command, check=True, timeout=300)
    named = re.sub(r"(_GLOBAL__N_|_INTERNAL)_[0-9a-f]+_", "", ptx.read_text())  # nvcc hashes the folder into names
    return [line for line in named.splitlines() if not line.startswith("//")]


@pytest.mark.heavy
@needs_compiler
@pytest.mark.parametrize("stem", ["bcast_project_backward", "bcast_weight_gradient"])
def test_where_it_is_off_it_changes_no_instruction(stem: str, tmp_path: Path) -> None:
    for name in ("off", "bare"):
        (tmp_path / name).mkdir()
        for path in SOURCES.glob("*.[ch]u*"):
            (tmp_path / name / path.name).write_text(path.read_text())
        for path in SOURCES.glob("*.h"):
            (tmp_path / name / path.name).write_text(path.read_text())
    (tmp_path / "bare/watchdog.h").write_text(BARE)
    assert instructions(tmp_path / "off", stem) == instructions(tmp_path / "bare", stem)


@pytest.fixture(scope="module")
def debug_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module with the watchdog. Its kernels are PTX for the emulator: nothing is assembled."""
    import pybind11

    folder = tmp_path_factory.mktemp("watchdog")
    for name, text in (
        ("nvcc", f'exec "{NVCC}" "$@"'),
        ("ptxas", 'while [ "$1" != -o ]; do shift; done; echo none > "$2"'),
        ("fatbinary", 'for word; do case "$word" in --create=*) echo none > "${word#--create=}" ;; esac; done'),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    include = next(
        path for path in (NVCC.parent.parent / "include", *NVCC.parent.parent.glob("targets/*/include"))
        if (path / "cuda.h").is_file()
    )  # fmt: skip
    build = folder / "build"
    for command in (
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}",
         f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DCMAKE_BUILD_TYPE=Release", "-DCAST_WATCHDOG=ON",
         f"-DCAST_NVCC={folder / 'nvcc'}", f"-DCAST_CUDA_INCLUDE={include}"],
        ["cmake", "--build", str(build), "--target", "_cuda", "-j", "1"],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    return next(build.glob("_cuda*.so"))


#: A forward on emulated launches. argv: the module, a pattern, and what takes the place of all that it matches in
#: `project`.
CODE = """
import importlib.util, re, sys
spec = importlib.util.spec_from_file_location("cast_kernels._cuda", sys.argv[1])
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from test_cuda_launches import TINY
from cuda_cases import call
from cast_kernels import _native
from cast_kernels.evidence import cuda_launches
assert _native.CUDA is module
known = dict(cuda_launches.entries())
kernel = "bcast_project_bf16_bf16_192"
changed, count = re.subn(sys.argv[2], sys.argv[3], known[kernel].ptx)
known[kernel] = known[kernel]._replace(ptx=changed)
cuda_launches.entries = lambda: known
print(count, "changes")
made = call(TINY)
with cuda_launches.emulated() as ran:
    made.forward()
print([one.launch.kernel for one in ran], all(bool(y.isfinite().all()) for y in made.y))
"""


def run(module: Path, pattern: str, instead: str) -> tuple[int, str, str]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tools", ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(module), pattern, instead], env=os.environ | {"PYTHONPATH": paths},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.heavy
@needs_compiler
def test_a_debug_build_runs_and_tells_nothing(debug_build: Path) -> None:
    code, out, error = run(debug_build, "no such thing", "")
    assert code == 0, error
    assert "bcast_exchange_bf16_bf16_192'] True" in out


#: What is planted in all of `project`'s barriers -> names of barriers that someone waits for then.
PLANTED = {
    "no arrival": (r"(@%p\d+ )?mbarrier\.arrive\.shared::cta\.b64 _, \[[^]]*\];", "", {"full", "empty"}),
    "a wrong count": (r"(mbarrier\.init\.shared::cta\.b64 \[[^]]*\], )%r\d+;", r"\g<1>7;", {"full"}),
}


@pytest.mark.heavy
@needs_compiler
@pytest.mark.parametrize("name", PLANTED)
def test_a_wait_without_an_end_is_told_and_traps(name: str, debug_build: Path) -> None:
    pattern, instead, barriers = PLANTED[name]
    code, out, error = run(debug_build, pattern, instead)
    assert code == 1
    assert int(out.split()[0]) > 0
    assert "EmulationFault: bcast_project_bf16_bf16_192 on sm_90" in error
    assert "trap, reached first by thread" in error
    told = re.findall(
        r"(\d+) warps, first warp (\d+) of CTA (\d+), wait for parity [01] of (\w+)\[(\d)\], at shared byte (\d+) "
        r"\((\w+\.\w+):(\d+)\)", error
    )  # fmt: skip
    assert barriers <= {one[3] for one in told}, error
    for count, warp, cta, _, place, address, file, line in told:
        assert 0 < int(count) <= 8 * 8
        assert int(warp) < 8
        assert int(cta) < 8
        assert int(place) < 4
        assert int(address) % 8 == 0
        assert "wait" in (SOURCES / file).read_text().splitlines()[int(line) - 1]
