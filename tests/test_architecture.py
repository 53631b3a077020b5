"""The rules of docs/architecture.md: who imports whom, and where a stranger finds an op."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cast_kernels.compiling import constant

ROOT = Path(__file__).parent.parent

#: Modules (by longest matching prefix) -> prefixes of our own modules that they may import.
ALLOWED: dict[str, tuple[str, ...]] = {
    "cast_kernels.reference": (),
    "cast_kernels.problem": (),
    "cast_kernels.plans": (),
    "cast_kernels.compiling": (),
    "cast_kernels.attention": ("cast_kernels.problem", "cast_kernels.compiling"),
    "cast_kernels.plain": ("cast_kernels.problem", "cast_kernels.compiling"),
    "cast_kernels.eager": ("cast_kernels.problem", "cast_kernels.attention"),
    "cast_kernels.versions": (),
    "cast_kernels.recompute": ("cast_kernels.problem", "cast_kernels.compiling", "cast_kernels.triton"),
    "cast_kernels.triton": (
        "cast_kernels.problem",
        "cast_kernels.attention",
        "cast_kernels.compiling",
        "cast_kernels.versions",
        "cast_kernels.triton",
    ),
    "cast_kernels.cpu": ("cast_kernels.problem", "cast_kernels.cpu", "cast_kernels._native", "cast_kernels._C"),
    "cast_kernels._native": ("cast_kernels._C",),
    "cast_kernels.backends": (
        "cast_kernels.problem",
        "cast_kernels._native",
        "cast_kernels.eager",
        "cast_kernels.cpu",
        "cast_kernels.triton",
    ),
    "cast_kernels.ops": (
        "cast_kernels.problem",
        "cast_kernels.attention",
        "cast_kernels.backends",
        "cast_kernels.recompute",
        "cast_kernels.eager",
        "cast_kernels.triton",
        "cast_kernels.ops._casts",
        "cast_kernels.ops._checks",
        "cast_kernels.ops._derivatives",
        "cast_kernels.ops._operator",
        "cast_kernels.ops._around_attention",
        "cast_kernels.ops._signatures",
        "cast_kernels.ops.adapter",
    ),
    "cast_kernels.modules": (
        "cast_kernels.problem",
        "cast_kernels.attention",
        "cast_kernels.plain",
        "cast_kernels.backends",
        "cast_kernels.recompute",
        "cast_kernels.ops",
        "cast_kernels.modules",
        "cast_kernels.eager",
    ),
    "cast_kernels.evidence": ("cast_kernels",),
    "cast_kernels.gpu": ("cast_kernels",),
    "cast_kernels": ("cast_kernels",),
    "cast.optional": (),
    "cast.processes": (),
    "cast.transfer": (),
    "cast.graphs": (),
    "cast.video": ("cast.video", "cast.files", "cast.optional", "cast.sampling", "cast.transfer"),
    "cast.config": ("cast_kernels",),
    "cast.layers": ("cast_kernels", "cast.config"),
    "cast.positions": ("cast.layers",),
    "cast.experts": ("cast_kernels", "cast.config", "cast.layers", "cast.positions", "cast.weights"),
    "cast.block": ("cast_kernels", "cast.config", "cast.layers"),
    "cast.heads": ("cast_kernels", "cast.config", "cast.layers"),
    "cast.labels": ("cast.files",),
    "cast.sampling": ("cast.files",),
    "cast.hub": ("cast.config", "cast.files", "cast.labels", "cast.sampling", "cast.weights"),
    "cast.weights": ("cast_kernels", "cast.config", "cast.layers", "cast.weights"),
    "cast.model": (
        "cast_kernels",
        "cast.config",
        "cast.layers",
        "cast.block",
        "cast.heads",
        "cast.hub",
        "cast.sampling",
        "cast.weights",
        "cast.experts",
        "cast.positions",
    ),
    "cast.zoo": ("cast.config", "cast.hub", "cast.model", "cast.sampling", "cast.weights"),
    "cast.predict": (
        "cast.config",
        "cast.labels",
        "cast.model",
        "cast.zoo",
        "cast.video",
        "cast.metrics",
        "cast.evaluation.protocol",
        "cast.files",
        "cast.graphs",
        "cast.predict",
        "cast.transfer",
    ),
    "cast.export": (
        "cast.config",
        "cast.labels",
        "cast.model",
        "cast.zoo",
        "cast.video",
        "cast.optional",
        "cast.sampling",
    ),
    "cast.pretrain": (
        "cast_kernels",
        "cast.config",
        "cast.layers",
        "cast.positions",
        "cast.experts",
        "cast.weights",
        "cast.video",
        "cast.training",
        "cast.pretrain",
        "cast.files",
        "cast.optional",
        "cast.transfer",
    ),
    "cast.training": (
        "cast_kernels",
        "cast.config",
        "cast.model",
        "cast.baselines",
        "cast.video",
        "cast.files",
        "cast.optional",
        "cast.processes",
        "cast.sampling",
        "cast.graphs",
        "cast.training",
        "cast.transfer",
    ),
    "cast.baselines": (
        "cast_kernels",
        "cast.baselines",
        "cast.config",
        "cast.files",
        "cast.layers",
        "cast.experts",
        "cast.heads",
        "cast.weights",
        "cast.optional",
    ),
    "cast.files": (),
    "cast.published": ("cast.files",),
    "cast.metrics": ("cast.metrics",),
    "cast.evaluation": (
        "cast_kernels",
        "cast.config",
        "cast.block",
        "cast.model",
        "cast.baselines",
        "cast.video",
        "cast.metrics",
        "cast.labels",
        "cast.sampling",
        "cast.training",
        "cast.processes",
        "cast.files",
        "cast.published",
        "cast.optional",
        "cast.weights",
        "cast.zoo",
        "cast.evaluation",
    ),
    "cast.demo": ("cast", "cast_kernels"),
    "cast.cli": ("cast",),
    "cast": ("cast", "cast_kernels"),
}
#: Room -> who may enter it.
PRIVATE = {
    "cast.demo": ("cast.demo", "cast.study", "cast.cli"),
    "cast.study": ("cast.study", "cast.cli"),
    "cast_kernels.evidence": ("cast_kernels.evidence", "cast_kernels.gpu", "cast_kernels.cli"),
    "cast_kernels.gpu": ("cast_kernels.gpu", "cast_kernels.cli", "cast_kernels.info"),
}


#: Ops without a native kernel and benchmark of their own -> the ops whose native kernels contain them.
NATIVE_INSIDE = {"adapter": ("ffn", "self_attention")}


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    """Every module of ours that the file imports, at any depth, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("cast", "cast_kernels")}


def inside(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


ALL = modules("cast_kernels") | modules("cast")


@pytest.mark.parametrize("name", ALL)
def test_imports_point_downwards(name: str) -> None:
    rule = max((key for key in ALLOWED if inside(name, (key,))), key=len)
    for target in imported(ALL[name]):
        assert inside(target, ALLOWED[rule]), f"{name} imports {target}; {rule} may import {ALLOWED[rule]}"
        for room, owners in PRIVATE.items():
            assert not inside(target, (room,)) or inside(name, owners), f"{name} enters {room}"


@pytest.mark.parametrize("name", modules("cast"))
def test_the_model_package_uses_public_kernels_only(name: str) -> None:
    import cast_kernels

    for target in imported(ALL[name]):
        if target.startswith("cast_kernels."):
            first = target.split(".")[1]
            assert first in cast_kernels.__all__, f"{name} imports {target}: not a public name of cast_kernels"


@pytest.mark.parametrize("name", modules("cast_kernels/evidence") | modules("cast_kernels/gpu"))
def test_the_evidence_uses_what_a_user_has(name: str) -> None:
    """Public names, and the tile tables that it judges and writes: what it shows is what the product does."""
    import cast_kernels

    for target in imported(ALL[name]) - {"cast_kernels"}:
        public = target.split(".")[1] in cast_kernels.__all__
        rooms = (
            "cast_kernels.evidence",
            "cast_kernels.gpu",
            "cast_kernels.triton.tiles",
            "cast_kernels.triton.common.architecture",
        )
        assert public or inside(target, rooms), f"{name} imports {target}"


def test_importing_the_package_imports_no_compiler_and_no_kernel() -> None:
    """They come when something runs or is asked about. Triton itself comes with PyTorch's FLOP counter."""
    code = "import sys, cast_kernels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "cast_kernels.ops.bcast" in loaded
    late = ("torch._dynamo", "torch._inductor", "cast_kernels.cpu", "cast_kernels.triton.tiles")
    assert [name for name in loaded if inside(name, late)] == []


def test_the_mark_of_a_constant_is_pytorchs_own() -> None:
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert vars(constant(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_the_native_core_knows_no_torch() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    for path in sources:
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text())
        assert not [i for i in includes if re.match(r"(torch|ATen|c10)/", i)], path
        if not path.name.startswith("bindings"):
            assert not [i for i in includes if i.startswith(("Python.h", "pybind11"))], path


def test_the_emulator_knows_numpy_only() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "ptx_emulator"}
    paths = sorted((ROOT / "tools/ptx_emulator").glob("*.py"))
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import; write the whole name"
                assert str(node.module).split(".")[0] in allowed, path
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path


def test_an_op_is_found_by_its_stem() -> None:
    stems = [p.stem for p in (ROOT / "cast_kernels/ops").glob("*.py") if not p.stem.startswith("_")]
    assert stems
    for stem in stems:
        places = [f"cast_kernels/{backend}/{stem}.py" for backend in ("eager", "triton")]
        places += [f"tests/test_{stem}.py", f"docs/ops/{stem}.md"]
        for native in NATIVE_INSIDE.get(stem, (stem,)):
            places += [f"cast_kernels/cpu/{native}.py", f"csrc/cpu/{native}*.h", f"benchmarks/bench_{native}.py"]
        assert [place for place in places if not list(ROOT.glob(place))] == []
        assert f"def {stem}(" in (ROOT / "cast_kernels/reference.py").read_text()


def test_no_file_outgrows_its_reader() -> None:
    files = [p for d in ("cast", "cast_kernels", "csrc", "benchmarks", "tests", "tools") for p in (ROOT / d).rglob("*")]
    long = {
        str(p.relative_to(ROOT)): n
        for p in files
        if p.suffix in (".py", ".h", ".cpp") and (n := len(p.read_text().splitlines())) > 450
    }
    assert long == {}
