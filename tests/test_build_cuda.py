"""Building the CUDA kernels: which toolkit is taken, what is recorded, and that an install without one goes on."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
from ptx_emulator.core.parser import parse

from cast_kernels import _native, info
from cast_kernels.evidence.cuda_modules import entries, modules

ROOT = Path(__file__).parent.parent
Find = Callable[[], tuple[Any, str]]


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(folder: Path, release: str = "13.0.88", headers: str = "include") -> Path:
    """A folder as NVIDIA lays it out; its programs tell their release and no more."""
    for name in ("nvcc", "ptxas", "fatbinary"):
        program(folder / "bin" / name, f'echo "Cuda compilation tools, release {release[:4]}, V{release}"')
    (folder / headers).mkdir(parents=True)
    (folder / headers / "cuda.h").write_text("")
    return folder


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No toolkit anywhere: a folder whose `path` is PATH and whose `site` is where packages lie."""
    for name in ("path", "site"):
        (tmp_path / name).mkdir()
    paths = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name: str(tmp_path / "site") if name == "purelib" else paths(name)
    )
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    return tmp_path


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Find:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))["find_toolkit"]


def test_cuda_home_comes_before_path_and_path_before_the_environment(
    places: Path, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(places / "site/nvidia/cu13", "13.0.3")
    assert find()[0].release == "13.0.3"
    on_path = toolkit(places / "local/cuda", "13.0.2")
    (places / "path/nvcc").symlink_to(on_path / "bin/nvcc")
    assert find()[0][:3] == (on_path / "bin/nvcc", on_path / "include", "13.0.2")
    home = toolkit(places / "home", "13.0.1", "targets/x86_64-linux/include")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert find() == ((home / "bin/nvcc", home / "targets/x86_64-linux/include", "13.0.1", "13.0.1"), "")


def test_a_script_on_path_that_calls_another_nvcc_leads_to_its_toolkit(places: Path, find: Find) -> None:
    """As distributions and containers have it: beside the script lie neither headers nor the other programs."""
    real = toolkit(places / "opt/cuda-13.0")
    program(
        places / "path/nvcc", f'[ "$1" = -dryrun ] && echo "#\\$ _HERE_=x" >&2 && echo "#\\$ TOP={real}/bin/.." >&2'
    )
    assert find()[0].nvcc == real / "bin/nvcc"


def test_without_a_toolkit_each_place_has_its_reason(places: Path, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find() == (
        None,
        "no CUDA compiler: CUDA_HOME is not set; no nvcc on PATH; this environment has no nvidia/cu13/bin/nvcc: "
        "pip install 'cast-kernels[cuda-build]'",
    )
    home = toolkit(places / "home")
    (home / "include/cuda.h").unlink()
    (home / "bin/ptxas").unlink()
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert f"{home} has no bin/ptxas, include/cuda.h; no nvcc on PATH" in find()[1]
    toolkit(places / "site/nvidia/cu13")
    program(places / "site/nvidia/cu13/bin/ptxas", "exit 1")
    assert "ptxas --version tells no release" in find()[1]


#: Stands for cmake; `_cuda` does not compile where BROKEN says so.
CMAKE = """
for word; do last=$word; done
if [ "$1" = --build ]; then
  cd "$2" || exit 9
  [ "$last" = "$BROKEN" ] && echo "FAILED: x.ptx" && echo "$TOLD" && exit 1
  echo "$last" > "$last$SUFFIX"
else
  case "$*" in *-DCAST_NVCC=$CUDA_HOME/bin/nvcc*-DCAST_CUDA_INCLUDE=$CUDA_HOME/include*) ;; *) exit 8 ;; esac
  while [ "$1" != -B ]; do shift; done
  echo '{"levels": ["baseline"]}' > "$2/parts.json"
  echo '{"architectures": ["sm_90a"]}' > "$2/cuda_parts.json"
fi
"""


def build(folder: Path, wish: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run setup.py with a cmake and a toolkit that only seem so -> what it said, and the package's folder."""
    program(folder / "cmake", CMAKE)
    home = folder / "cuda"
    if not home.exists():
        toolkit(home)
    own = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "CUDA_HOME": str(home), "SUFFIX": EXTENSION_SUFFIXES[0],
        "CAST_KERNELS_BUILD_CPU": "auto", "CAST_KERNELS_BUILD_CUDA": wish, "BROKEN": "",
    }  # fmt: skip
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    done = subprocess.run(
        command, env=os.environ | own | variables, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done, folder / "lib/cast_kernels"


def test_what_was_built_is_recorded(tmp_path: Path) -> None:
    done, package = build(tmp_path, "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((package / "_build.json").read_text())
    assert record["cuda"] == {
        "requested": "auto", "built": True, "reason": "", "architectures": ["sm_90a"], "toolkit": "13.0.88",
        "ptxas": "13.0.88", "nvcc": f"{tmp_path}/cuda/bin/nvcc", "seconds": record["cuda"]["seconds"],
        "processor_seconds": record["cuda"]["processor_seconds"],
        "module_bytes": len("_cuda\n"),
    }  # fmt: skip
    assert record["cpu"]["levels"] == ["baseline"]
    assert (package / f"_cuda{EXTENSION_SUFFIXES[0]}").read_text() == "_cuda\n"


@pytest.mark.parametrize(("wish", "option"), [("1", "ON"), ("0", "OFF")])
def test_a_debug_build_is_asked_for_by_the_environment(wish: str, option: str, tmp_path: Path) -> None:
    done, _ = build(tmp_path, "1", CAST_KERNELS_WATCHDOG=wish)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"-DCAST_WATCHDOG={option}" in done.stdout


@pytest.mark.parametrize(
    "told", ["nvcc fatal   : Unsupported gpu architecture 'compute_90a'", "bcast_project.cu(12): error: no such type"]
)
def test_kernels_that_do_not_compile_take_no_other_module_with_them(told: str, tmp_path: Path) -> None:
    stale = tmp_path / f"lib/cast_kernels/_cuda{EXTENSION_SUFFIXES[0]}"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier build")
    done, package = build(tmp_path, "auto", BROKEN="_cuda", TOLD=told)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"not built: the CUDA kernels: {told}" in done.stderr
    record = json.loads((package / "_build.json").read_text())
    assert record["cuda"] == {"requested": "auto", "built": False, "reason": told}
    assert record["cpu"]["built"]
    assert record["emulator"]["built"]
    assert not stale.exists()
    done, _ = build(tmp_path, "1", BROKEN="_cuda", TOLD=told)
    assert done.returncode != 0
    assert f"CAST_KERNELS_BUILD_CUDA=1, but the CUDA kernels cannot be built: {told}" in done.stdout + done.stderr


def test_zero_leaves_them_out_though_there_is_a_toolkit(tmp_path: Path) -> None:
    done, package = build(tmp_path, "0", CAST_KERNELS_BUILD_CPU="0")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((package / "_build.json").read_text())["cuda"]
    assert record == {"requested": "0", "built": False, "reason": "CAST_KERNELS_BUILD_CUDA=0 left it out"}


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    info.show()
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


class Module:
    """Stands for `cast_kernels._cuda`."""

    def __init__(self, version: int, why: str) -> None:
        self.driver = lambda: (version, why)
        self.packed_ptx = lambda: {"bcast_project": b"", "bcast_exchange": b""}


def test_info_tells_toolkit_architectures_and_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"toolkit": "13.0.88", "ptxas": "13.0.89", "nvcc": "/x/bin/nvcc", "architectures": ["sm_90a"]}
    monkeypatch.setattr(_native, "RECORD", {"cuda": record})
    monkeypatch.setattr(_native, "CUDA", Module(13010, ""))
    monkeypatch.setenv("COLUMNS", "200")
    assert info.collect()["cuda"] == record | {
        "built": True, "modules": ["bcast_exchange", "bcast_project"], "driver": "13.1"
    }  # fmt: skip
    text = shown(capsys)
    assert "native cuda built: bcast_exchange, bcast_project toolkit 13.0.88 with ptxas 13.0.89 (/x/bin/nvcc)" in text
    assert "architectures sm_90a driver of CUDA 13.1" in text
    monkeypatch.setattr(_native, "CUDA", Module(0, "no NVIDIA driver: libcuda.so.1: no such file"))
    assert info.collect()["cuda"]["why_no_driver"] == "no NVIDIA driver: libcuda.so.1: no such file"
    assert "driver none: no NVIDIA driver: libcuda.so.1: no such file" in shown(capsys)


def test_info_tells_why_the_kernels_are_missing_and_what_would_change_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_native, "CUDA", None)
    monkeypatch.setattr(_native, "CUDA_REASON", "the CUDA kernels are not built: no nvcc on PATH")
    told = info.collect()["cuda"]
    assert not told["built"]
    assert told["reason"] == "the CUDA kernels are not built: no nvcc on PATH"
    monkeypatch.setenv("COLUMNS", "200")
    text = shown(capsys)
    assert "native cuda not built: the CUDA kernels are not built: no nvcc on PATH" in text
    assert "pip install '.[cuda-build]' && CAST_KERNELS_BUILD_CUDA=1 pip install" in text


@pytest.mark.skipif(_native.CUDA is None, reason=f"nothing to import: {_native.CUDA_REASON}")
def test_the_module_needs_neither_torch_nor_a_cuda_runtime_nor_a_driver() -> None:
    code = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_cuda", {_native.CUDA.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
loaded = {{line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}}
print(json.dumps([module.driver(), "torch" in sys.modules, sorted(loaded)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (version, why), torch, loaded = json.loads(done.stdout)
    assert not torch
    assert not [path for path in loaded if "cudart" in path or "torch" in path or "libcuda" in path]
    assert (version > 0) != bool(why)
    if not version:
        assert why.startswith("no NVIDIA driver: libcuda.so.1")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
def test_source_files_of_ptx_lose_the_folders_of_the_machine(tmp_path: Path) -> None:
    ptx = tmp_path / "a folder" / "x.ptx"
    ptx.parent.mkdir()
    told = '\t.file\t1 "/a b/csrc/cuda/x;y.cu"\n\t.file\t2 "/opt/cuda/bin/../include/cuda_bf16.hpp"\n\t.file 3 "z.h"\n'
    rest = '.global .b8 s[4] = "/a/b";\n{ mov.b64 {%r1, %r2}, %rd1; // [a];b \\ \n}\n'
    ptx.write_text(rest + told)
    script = str(ROOT / "csrc/cuda/relative_paths.cmake")
    subprocess.run(["cmake", f"-DPTX={ptx}", "-P", script], check=True, timeout=60)
    kept = '\t.file\t1 "csrc/cuda/x;y.cu"\n\t.file\t2 "cuda_bf16.hpp"\n\t.file 3 "z.h"\n'
    assert ptx.read_text() == rest + kept


@pytest.mark.skipif(_native.CUDA is None, reason=f"nothing to read: {_native.CUDA_REASON}")
def test_what_is_embedded_names_our_files_and_no_folder_of_the_machine() -> None:
    for name, text in modules().items():
        files = re.findall(r'^\s*\.file\s+\d+\s+"([^"]*)"', text, re.MULTILINE)
        assert f"csrc/cuda/{name}.cu" in files
        assert [path for path in files if not re.fullmatch(r"(csrc/cuda/)?[\w.]+", path)] == []
        assert '"/' not in text
    for path in (ROOT, Path(_native.RECORD.get("cuda", {}).get("nvcc", "/no/such")).parent.parent):
        assert str(path).encode() not in Path(_native.CUDA.__file__).read_bytes()


@pytest.mark.skipif(_native.CUDA is None, reason=f"nothing to read: {_native.CUDA_REASON}")
def test_the_emulator_still_tells_the_line_of_a_source() -> None:
    kernel = "bcast_position_sums_bf16"
    read = parse(entries()[kernel].ptx).kernels[kernel]
    lines = {read.where(number).rpartition(":")[0] for number in range(len(read.instructions))}
    assert lines >= {"bcast_position_sums.cu", "cuda_bf16.hpp"}
