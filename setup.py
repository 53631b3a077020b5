"""Builds the native core, the PTX emulator's machine and the CUDA kernels with CMake and Ninja, and records what was
built, and why not.

`CAST_KERNELS_BUILD_CPU` (of the first two) and `CAST_KERNELS_BUILD_CUDA` take `0` (leave it out), `1` (its failure
fails the install) or `auto` (the default: try; a part that cannot be built is left out and recorded for `cast-kernels
info`). The CUDA kernels take the first toolkit of: CUDA_HOME, `nvcc` on PATH, `nvidia/cu13` of this environment.
`CAST_KERNELS_WATCHDOG=1` makes a debug build of them, see docs/cuda.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CHOICES = ("auto", "0", "1")


class Module(NamedTuple):
    """What CMake builds."""

    name: str
    what: str
    switch: str  # of CAST_KERNELS_BUILD_...


#: By the name in the record.
MODULES = {
    "cpu": Module("cast_kernels._C", "the native core", "CPU"),
    "emulator": Module("ptx_emulator.native._machine", "the PTX emulator's machine", "CPU"),
    "cuda": Module("cast_kernels._cuda", "the CUDA kernels", "CUDA"),
}


class Toolkit(NamedTuple):
    """A CUDA toolkit that can build the kernels."""

    nvcc: Path
    include: Path  # where cuda.h lies
    release: str  # "13.0.88"
    ptxas: str  # its release

    def told(self) -> dict[str, str]:
        """What to record of it."""
        return {"toolkit": self.release, "ptxas": self.ptxas, "nvcc": str(self.nvcc)}


def requested(part: str) -> str:
    """The value of the part's environment variable; exits with the allowed ones if it is none of them."""
    name = f"CAST_KERNELS_BUILD_{part}"
    value = os.environ.get(name) or "auto"
    if value not in CHOICES:
        sys.exit(f"error: {name} is {value!r}; allowed: {', '.join(CHOICES)}")
    return value


class BuildNative(build_ext):
    """Runs CMake where setuptools would run a compiler, and writes `cast_kernels/_build.json`."""

    def run(self) -> None:
        wishes = {part: requested(module.switch) for part, module in MODULES.items()}
        paths = {part: Path(self.get_ext_fullpath(module.name)).resolve() for part, module in MODULES.items()}
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        record = self._build(wishes, paths)
        for part, path in paths.items():
            if not record[part]["built"]:
                path.unlink(missing_ok=True)  # of an earlier build
        # setuptools would look for the files of the others
        self.extensions = [one for one in self.extensions if record[_part(one.name)]["built"]]
        put(json.dumps(record, indent=2).encode() + b"\n", paths["cpu"].parent / "_build.json")

    def _build(self, wishes: dict[str, str], paths: dict[str, Path]) -> dict[str, dict[str, Any]]:
        """Build each module -> what to record of it. One that cannot be built keeps no other from being built."""
        reasons = {
            part: f"CAST_KERNELS_BUILD_{MODULES[part].switch}=0 left it out" for part in paths if wishes[part] == "0"
        }
        toolkit = None
        if "cuda" not in reasons:
            toolkit, why = find_toolkit()
            if toolkit is None:
                reasons["cuda"] = why
        wanted = {part: path for part, path in paths.items() if part not in reasons}
        facts: dict[str, dict[str, Any]] = {}
        if wanted:
            failed, facts = self._cmake(wanted, toolkit)
            reasons |= failed
        for part, reason in reasons.items():
            _, what, switch = MODULES[part]
            if reason and wishes[part] == "1":
                sys.exit(f"error: CAST_KERNELS_BUILD_{switch}=1, but {what} cannot be built: {reason}")
            if reason and wishes[part] == "auto":
                print(f"warning: not built: {what}: {reason}", file=sys.stderr)
        return {
            part: {"requested": wishes[part], "built": not reasons[part], "reason": reasons[part]}
            | ({} if reasons[part] else facts[part])
            for part in paths
        }

    def _cmake(
        self, paths: dict[str, Path], toolkit: Toolkit | None
    ) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """(why a module cannot be built, "" for one that is; what is to be recorded of those that are)."""
        build = Path(self.build_temp).resolve() / "cast_kernels"
        try:
            command = self._configure(build, toolkit)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            return dict.fromkeys(paths, _cause(error)), {}
        reasons, facts = {}, {}
        for part, path in paths.items():
            reasons[part], begin, spent = "", time.monotonic(), _processor_seconds()
            try:
                _run([*command, "--target", path.name.partition(".")[0]])
                put((build / path.name).read_bytes(), path)
            except (OSError, subprocess.CalledProcessError) as error:
                reasons[part] = _cause(error)
            else:
                facts[part] = json.loads((build / ("cuda_parts.json" if part == "cuda" else "parts.json")).read_text())
                if toolkit and part == "cuda":
                    facts[part] |= toolkit.told()
                    facts[part] |= {
                        "seconds": round(time.monotonic() - begin),
                        "processor_seconds": round(_processor_seconds() - spent),
                        "module_bytes": path.stat().st_size,
                    }
        return reasons, facts

    def _configure(self, build: Path, toolkit: Toolkit | None) -> list[str]:
        """Make an empty build folder -> the command that builds all of it."""
        import pybind11

        shutil.rmtree(build, ignore_errors=True)  # a cache of another environment's cmake or pybind11 is worthless
        build.mkdir(parents=True)
        cmake = _tool("cmake")
        _run([
            cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-S", str(ROOT), "-B", str(build),
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release", *_cuda_options(toolkit),
        ])  # fmt: skip
        return [cmake, "--build", str(build)]


class BuildWithRecipes(build_py):
    """Copies into empty packages, and puts the recipes, which lie beside the package, into the installed one."""

    def run(self) -> None:
        library = Path(self.build_lib).resolve()
        if not self.editable_mode and library != ROOT:
            for package in {name.partition(".")[0] for name in self.packages}:
                shutil.rmtree(library / package, ignore_errors=True)  # an earlier build's would go into the wheel
        super().run()
        if self.editable_mode:
            return  # the source tree's own are found
        target = Path(self.build_lib) / "cast" / "recipes"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(ROOT / "recipes", target)


def _part(module: str) -> str:
    """The name in the record of a module."""
    return next(part for part, one in MODULES.items() if one.name == module)


def find_toolkit() -> tuple[Toolkit | None, str]:
    """The first CUDA toolkit that has all that a build needs; None and why each place has none."""
    reasons = []
    for nvcc, missing in _compilers():
        reason = missing
        for folder in _toolkits(nvcc) if nvcc else ():
            toolkit, reason = _read_toolkit(folder)
            if toolkit:
                return toolkit, ""
        reasons.append(reason)
    return None, f"no CUDA compiler: {'; '.join(reasons)}"


def _compilers() -> Iterator[tuple[Path | None, str]]:
    """nvcc of each place, and what to say where it has none."""
    home, found = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    yield Path(home, "bin/nvcc") if home else None, "CUDA_HOME is not set"
    yield Path(found) if found else None, "no nvcc on PATH"
    # A build in isolation runs this environment's interpreter, too.
    own = Path(sysconfig.get_path("purelib"), "nvidia/cu13/bin/nvcc")
    missing = "this environment has no nvidia/cu13/bin/nvcc: pip install 'cast-kernels[cuda-build]'"
    yield own if own.is_file() else None, missing


def _toolkits(nvcc: Path) -> Iterator[Path]:
    """Folders in which the rest of its toolkit may lie: nvcc on PATH may be a link, or a script that calls another."""
    yield nvcc.resolve().parent.parent
    command = [str(nvcc), "-dryrun", "-E", "-x", "cu", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return  # _read_toolkit says of the first folder what is wrong
    if top := re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE):
        yield Path(top[1].strip()).resolve()


def _read_toolkit(folder: Path) -> tuple[Toolkit | None, str]:
    """The toolkit in a folder, or what it lacks."""
    headers = (folder / "include", *sorted(folder.glob("targets/*/include")))
    include = next((path for path in headers if (path / "cuda.h").is_file()), None)
    lacks = [f"bin/{name}" for name in ("nvcc", "ptxas", "fatbinary") if not (folder / "bin" / name).is_file()]
    lacks += [] if include else ["include/cuda.h"]
    if include is None or lacks:
        return None, f"{folder} has no {', '.join(lacks)}"
    releases = []
    for name in ("nvcc", "ptxas"):
        command = [str(folder / "bin" / name), "--version"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.SubprocessError) as error:
            return None, f"{command[0]} does not run: {error}"
        release = re.search(r"\bV(\d[\d.]*)", told)
        if release is None:
            return None, f"{command[0]} --version tells no release"
        releases.append(release[1])
    return Toolkit(folder / "bin/nvcc", include, *releases), ""


def _cuda_options(toolkit: Toolkit | None) -> list[str]:
    if toolkit is None:
        return []
    watchdog = "ON" if os.environ.get("CAST_KERNELS_WATCHDOG", "0") not in ("", "0") else "OFF"
    return [f"-DCAST_NVCC={toolkit.nvcc}", f"-DCAST_CUDA_INCLUDE={toolkit.include}", f"-DCAST_WATCHDOG={watchdog}"]


def put(content: bytes, target: Path) -> None:
    """Write the file under another name beside its own first: who reads meanwhile finds the old one or the new one."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _tool(name: str) -> str:
    """The program's path: on PATH, or beside this interpreter, where pip puts it."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise FileNotFoundError(2, "there is no such program; pip install cmake ninja", name)
    return found


def _processor_seconds() -> float:
    """Of all programs that were run and have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _run(command: list[str]) -> None:
    print("+", " ".join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, output=done.stdout)


def _cause(error: ImportError | OSError | subprocess.CalledProcessError) -> str:
    """The first line that names an error, or what the system said."""
    if isinstance(error, ImportError):
        return f"{error}; without build isolation, the build requirements of pyproject.toml must be installed"
    if isinstance(error, OSError):
        return f"cannot run {error.filename or 'cmake'}: {error.strerror or error}"
    lines = [line.strip() for line in (error.output or "").splitlines()]
    for number, line in enumerate(lines):
        if "error" in line.lower() or line.startswith("nvcc fatal"):
            # CMake puts the text of an error on the lines after "CMake Error at ...".
            follow = next((x for x in lines[number + 1 :] if x), "") if line.startswith("CMake Error") else ""
            return f"{line} {follow}".strip()
    return f"{' '.join(error.cmd[:2])} ended with status {error.returncode}"


setup(
    ext_modules=[Extension(module.name, sources=[]) for module in MODULES.values()],
    cmdclass={"build_ext": BuildNative, "build_py": BuildWithRecipes},
)
