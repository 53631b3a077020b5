"""What the installation says of itself, and the build's switches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import engines
import pytest
import torch
from levels import LEVELS
from ptx_emulator.native import library

from cast_kernels import _native, info
from cast_kernels.gpu.machine import driver_version

ROOT = Path(__file__).parent.parent


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_json_tells_what_was_built_and_what_runs() -> None:
    done = python("from cast_kernels.cli import main; raise SystemExit(main(['info', '--json']))")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["cpu"]["built"] == (_native.CORE is not None)
    assert told["runs"]["instruction_set"] == _native.ISA
    if engines.built():
        assert told["emulator"] == {"built": True, "level": library.library().level}
    assert told["cuda"]["built"] == (_native.CUDA is not None)
    assert told["backends"]["cpu"][0]
    assert told["backends"]["eager"][0]


def test_a_missing_core_names_the_reason_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "CORE", None)
    monkeypatch.setattr(_native, "REASON", "the native core is not built: no compiler")
    monkeypatch.setattr(_native, "ISA", "")
    told = info.collect()
    assert told["cpu"]["reason"] == "the native core is not built: no compiler"
    assert "CAST_KERNELS_BUILD_CPU=1 pip install" in told["cpu"]["change_with"]
    assert told["backends"]["cpu"] == [False, "the native core is not built: no compiler"]


def test_a_missing_machine_of_the_emulator_names_the_reason_and_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise library.NotBuilt("there is none in the folder")

    monkeypatch.setattr(library, "library", missing)
    monkeypatch.setattr(_native, "RECORD", {})
    assert info.collect()["emulator"]["reason"] == "there is none in the folder"
    monkeypatch.setattr(_native, "RECORD", {"emulator": {"built": False, "reason": "level.cpp:3: error: no such"}})
    told = info.collect()
    assert told["emulator"]["reason"] == "level.cpp:3: error: no such"
    assert told["cpu"]["built"] == (_native.CORE is not None)
    info.show()
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "native emulator not built: level.cpp:3: error: no such to change it CAST_KERNELS_BUILD_CPU=1 pip" in shown


@pytest.mark.parametrize("level", ["baseline", *(_native.RECORD.get("cpu", {}).get("levels", []))])
def test_the_instruction_set_can_be_capped(level: str) -> None:
    done = python("from cast_kernels import _native; print(_native.ISA)", CAST_KERNELS_CPU_ISA=level)
    assert done.returncode == 0, done.stderr
    assert LEVELS.index(done.stdout.strip()) <= LEVELS.index(level)


def test_an_unknown_level_is_refused() -> None:
    code = """
import torch, cast_kernels
cast_kernels.BCAST(8, 4, 1, 2, 3)(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 3, 8))
"""
    done = python(code, CAST_KERNELS_CPU_ISA="mmx")
    assert done.returncode != 0
    assert "CAST_KERNELS_CPU_ISA" in done.stderr
    assert "avx2" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps to see what is loaded")
def test_there_is_one_openmp_runtime() -> None:
    code = """
import cast_kernels, torch
cast_kernels.BCAST(8, 4, 1, 2, 3)(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 3, 8))
print({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line and ".so" in line})
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert len(eval(done.stdout)) == 1, done.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CAST_KERNELS_BUILD_CPU": "yes"}, "CAST_KERNELS_BUILD_CPU is 'yes'; allowed: auto, 0, 1"),
        ({"CAST_KERNELS_BUILD_CUDA": "yes"}, "CAST_KERNELS_BUILD_CUDA is 'yes'; allowed: auto, 0, 1"),
        ({"CAST_KERNELS_BUILD_CPU": "1", "CXX": "/no/compiler"}, "CAST_KERNELS_BUILD_CPU=1, but the native core"),
    ],
)
def test_the_build_fails_when_told_to(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    done = build(tmp_path, variables)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variables", "reason"),
    [({"CAST_KERNELS_BUILD_CPU": "0"}, "left it out"), ({"CXX": "/no/compiler"}, "compiler")],
)
def test_the_install_survives_without_the_core(variables: dict[str, str], reason: str, tmp_path: Path) -> None:
    done = build(tmp_path, variables)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "lib/cast_kernels/_build.json").read_text())
    assert not record["cpu"]["built"]
    assert reason in record["cpu"]["reason"]
    assert record["emulator"] == record["cpu"]
    assert list(tmp_path.glob("lib/*/**/_[Cm]*.so")) == []


#: Stands for cmake: each target's module is a file with its name, but for the one that does not compile.
CMAKE = """#!/bin/sh
for word; do last=$word; done
if [ "$1" = --build ]; then
  cd "$2" || exit 9
  [ "$last" = "$BROKEN" ] && echo "$last.cpp:3: error: no such type" && exit 1
  echo "$last" > "$last$SUFFIX"
else
  while [ "$1" != -B ]; do shift; done
  echo '{"levels": ["baseline"]}' > "$2/parts.json"
fi
"""


@pytest.mark.parametrize("broken", ["_C", "_machine"])
def test_one_module_that_does_not_compile_takes_no_other_with_it(broken: str, tmp_path: Path) -> None:
    (tmp_path / "cmake").write_text(CMAKE)
    (tmp_path / "cmake").chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "BROKEN": broken, "SUFFIX": EXTENSION_SUFFIXES[0],
        "CAST_KERNELS_BUILD_CPU": "auto",
    }  # fmt: skip
    places = {"_C": ("cpu", "cast_kernels"), "_machine": ("emulator", "ptx_emulator/native")}
    stale = tmp_path / "lib" / places[broken][1] / f"{broken}{EXTENSION_SUFFIXES[0]}"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier build")
    done = build(tmp_path, variables)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "lib/cast_kernels/_build.json").read_text())
    for name, (part, folder) in places.items():
        found = [path.read_text() for path in (tmp_path / "lib" / folder).glob("_[Cm]*.so")]
        assert found == ([] if name == broken else [f"{name}\n"])
        assert record[part]["built"] == (name != broken)
        assert record[part]["reason"] == (f"{name}.cpp:3: error: no such type" if name == broken else "")
    done = build(tmp_path, variables | {"CAST_KERNELS_BUILD_CPU": "1"})
    assert done.returncode != 0
    assert "cannot be built: " + f"{broken}.cpp:3: error: no such type" in done.stdout + done.stderr


def build(directory: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(directory / "lib"), "--build-temp", str(directory / "temp")]
    without = {"CAST_KERNELS_BUILD_CUDA": "0"}  # tests/test_build_cuda.py has it
    return subprocess.run(
        command, env=os.environ | without | variables, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


def test_a_gpu_is_named_and_its_problem_is_asked_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    h100 = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: h100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(info, "driver_version", lambda: "580.65.06")
    told = info.collect()
    assert [gpu["name"] for gpu in told["gpus"]] == ["NVIDIA H100 80GB HBM3"] * 2
    assert told["backends"]["triton"][0]
    assert not told["backends"]["cpu"][0]
    info.show()
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "compute capability 9.0, 132 multiprocessors, 80 GiB" in shown
    assert "580.65.06" in shown


def test_without_a_gpu_it_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    told = info.collect()
    assert "sees none" in told["gpu"]["why_none"]
    assert "cpu" in told["problem"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)",
            "580.65.06",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 17 2024", "535.161.08"),
        ("nothing of the kind", "unknown: "),
    ],
)
def test_the_driver_is_read_from_the_kernel_module(text: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert driver_version().startswith(version)
