"""Builds the native core and the PTX emulator's machine with CMake and Ninja, and records what was built, and why not.

`CAST_KERNELS_BUILD_CPU` (of both) and `CAST_KERNELS_BUILD_CUDA` take `0` (leave it out), `1` (its failure fails the
install) or `auto` (the default: try; a part that cannot be built is left out and recorded for `cast-kernels info`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CHOICES = ("auto", "0", "1")
#: What CMake builds: name in the record -> module, and what it is.
MODULES = {
    "cpu": ("cast_kernels._C", "the native core"),
    "emulator": ("ptx_emulator.native._machine", "the PTX emulator's machine"),
}


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
        wishes = {part: requested(part) for part in ("CPU", "CUDA")}
        modules = {part: Path(self.get_ext_fullpath(name)).resolve() for part, (name, _) in MODULES.items()}
        for module in modules.values():
            module.parent.mkdir(parents=True, exist_ok=True)
        native = self._native(wishes["CPU"], modules)
        for part, module in modules.items():
            if not native[part]["built"]:
                module.unlink(missing_ok=True)  # of an earlier build
        # setuptools would look for the files of the others
        self.extensions = [one for one in self.extensions if native[_part(one.name)]["built"]]
        record = {**native, "cuda": self._cuda(wishes["CUDA"])}
        put(json.dumps(record, indent=2).encode() + b"\n", modules["cpu"].parent / "_build.json")

    def _native(self, wish: str, modules: dict[str, Path]) -> dict[str, dict[str, Any]]:
        """Build each module -> what to record of it. One that cannot be built keeps no other from being built."""
        if wish == "0":
            reasons, facts = dict.fromkeys(modules, "CAST_KERNELS_BUILD_CPU=0 left it out"), {}
        else:
            reasons, facts = self._cmake(modules)
            for part, reason in reasons.items():
                what = MODULES[part][1]
                if reason and wish == "1":
                    sys.exit(f"error: CAST_KERNELS_BUILD_CPU=1, but {what} cannot be built: {reason}")
                if reason:
                    print(f"warning: {what} was not built: {reason}", file=sys.stderr)
        return {
            part: {"requested": wish, "built": not reason, "reason": reason} | ({} if reason else facts)
            for part, reason in reasons.items()
        }

    def _cmake(self, modules: dict[str, Path]) -> tuple[dict[str, str], dict[str, Any]]:
        """(why a module cannot be built, "" for one that is; what CMake tells of the compiler)."""
        build = Path(self.build_temp).resolve() / "cast_kernels"
        try:
            command = self._configure(build)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            return dict.fromkeys(modules, _cause(error)), {}
        reasons = {}
        for part, module in modules.items():
            reasons[part] = ""
            try:
                _run([*command, "--target", module.name.partition(".")[0]])
                put((build / module.name).read_bytes(), module)
            except (OSError, subprocess.CalledProcessError) as error:
                reasons[part] = _cause(error)
        return reasons, json.loads((build / "parts.json").read_text())

    def _configure(self, build: Path) -> list[str]:
        """Make an empty build folder -> the command that builds all of it."""
        import pybind11

        shutil.rmtree(build, ignore_errors=True)  # a cache of another environment's cmake or pybind11 is worthless
        build.mkdir(parents=True)
        cmake = _tool("cmake")
        _run([
            cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-S", str(ROOT), "-B", str(build),
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
        ])  # fmt: skip
        return [cmake, "--build", str(build)]

    def _cuda(self, wish: str) -> dict[str, Any]:
        if wish == "1":
            sys.exit("error: CAST_KERNELS_BUILD_CUDA=1, but this version has no CUDA sources to build; use auto or 0")
        reason = "CAST_KERNELS_BUILD_CUDA=0 left it out" if wish == "0" else "this version has no CUDA sources"
        return {"requested": wish, "built": False, "reason": reason}


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
    return next(part for part, (name, _) in MODULES.items() if name == module)


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
        if "error" in line.lower():
            # CMake puts the text of an error on the lines after "CMake Error at ...".
            follow = next((x for x in lines[number + 1 :] if x), "") if line.startswith("CMake Error") else ""
            return f"{line} {follow}".strip()
    return f"{' '.join(error.cmd[:2])} ended with status {error.returncode}"


setup(
    ext_modules=[Extension(name, sources=[]) for name, _ in MODULES.values()],
    cmdclass={"build_ext": BuildNative, "build_py": BuildWithRecipes},
)
