"""The rules of tests/rooms.py and docs/architecture.md: who imports whom, and where a stranger finds an op."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import rooms
import torch

from cast_kernels.compiling import constant

ROOT = Path(__file__).parent.parent

#: Ops without a native kernel and benchmark of their own -> the ops whose native kernels contain them.
NATIVE_INSIDE = {"adapter": ("ffn", "self_attention")}


@pytest.mark.parametrize("name", [name for name in rooms.modules() if not name.startswith("tests")])
def test_imports_point_downwards(name: str) -> None:
    room = rooms.room_of(name)
    wrong = [
        target
        for target in rooms.imported(rooms.modules()[name])
        if not any(rooms.covers(rule, target) for rule in room.allowed())
    ]
    assert wrong == [], f"{name} imports {wrong}; {room.name} may import {room.allowed()}"


@pytest.mark.parametrize("room", rooms.ROOMS, ids=lambda room: room.name)
def test_no_rule_is_wider_than_what_is_used(room: rooms.Room) -> None:
    modules = {name: path for name, path in rooms.modules().items() if not name.startswith("tests")}
    inside = [path for name, path in modules.items() if rooms.room_of(name) == room]
    targets = {target for path in inside for target in rooms.imported(path)}
    assert inside or room.name == "csrc"
    idle = [rule for rule in room.allowed() if not any(rooms.covers(rule, target) for target in targets)]
    assert idle == [], f"nothing in {room.name} imports {idle}: take it out of tests/rooms.py"


def test_every_python_file_is_in_a_room_or_imports_none_of_ours() -> None:
    alone = [ROOT / "docs/conf.py", ROOT / "setup.py"]
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name in rooms.FOLDERS.values()]
    found = [
        path for folder in (*folders, ROOT / "csrc", ROOT / "docs", ROOT / "recipes") for path in folder.rglob("*.py")
    ]
    assert {*found, *ROOT.glob("*.py")} == {*rooms.modules().values(), *alone}
    assert [path for path in alone if rooms.imported(path)] == []
    assert rooms.module_of("website.svg.Picture") == "website.svg"
    assert rooms.module_of("hub_package") == "tools.hub_package"


def test_a_wrong_import_is_found(tmp_path: Path) -> None:
    """A public name is no room, a room is no public name, and a module needs a room."""
    (tmp_path / "wrong.py").write_text(
        "from cast_kernels import bcast, cpu\nfrom cast.video import reader\n\ndef later():\n    import bcast_cases\n"
    )
    found = rooms.imported(tmp_path / "wrong.py")
    assert found == {"cast_kernels", "cast_kernels.cpu", "cast.video.reader", "tests.bcast_cases"}
    layers = rooms.room_of("cast.model.layers")
    assert [target for target in sorted(found) if any(rooms.covers(rule, target) for rule in layers.allowed())] == [
        "cast_kernels"
    ]
    with pytest.raises(LookupError, match=r"cast\.attic is in no room"):
        rooms.room_of("cast.attic")


def test_the_page_has_the_rules_as_they_are() -> None:
    text = rooms.PAGE.read_text()
    assert text == rooms.page(text), "docs/architecture.md is stale: python tests/rooms.py"
    assert rooms.page(text.replace("| `cast.cli`", "| `cli`").replace("| `zoo` |", "| `zoon` |")) == text


def test_importing_the_package_imports_no_compiler_and_no_kernel() -> None:
    """They come when something runs or is asked about. Triton itself comes with PyTorch's FLOP counter."""
    code = "import sys, cast_kernels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "cast_kernels.ops.bcast" in loaded
    late = ("torch._dynamo", "torch._inductor", "cast_kernels.cpu", "cast_kernels.triton.tiles")
    assert [name for name in loaded if any(rooms.covers(part, name) for part in late)] == []


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
    folder = ROOT / "tools/ptx_emulator"
    paths = sorted([*folder.glob("*.py"), *(folder / "core").rglob("*.py"), *(folder / "cuda").rglob("*.py")])
    assert len(paths) > 40
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import; write the whole name"
                assert str(node.module).split(".")[0] in allowed, path
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the one before it, the first again at the end; none where there is no circle."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("room", ["cast.model", "cast.ground", "cast.loading"])
def test_modules_of_a_room_import_each_other_in_no_circle(room: str) -> None:
    """Inside a room there is no rule of its own, but an order."""
    names = [name for name in rooms.modules() if rooms.covers(room, name)]
    imports = {name: rooms.imported(rooms.modules()[name]) for name in names}
    assert len(imports) >= 3
    assert circle(imports) == []
    assert circle({**imports, f"{room}.low": {f"{room}.high"}, f"{room}.high": {f"{room}.low"}})


def test_the_emulators_modules_import_each_other_in_no_circle(tmp_path: Path) -> None:
    """Neither when they run nor for a type checker alone."""
    names = [name for name in rooms.modules() if name.split(".")[0] == "ptx_emulator"]
    imports = {name: rooms.imported(rooms.modules()[name]) for name in names}
    assert circle(imports) == []
    hidden = tmp_path / "state.py"
    hidden.write_text("if TYPE_CHECKING:\n    from ptx_emulator.core.execute import Machine\n")
    found = circle({**imports, "ptx_emulator.core.state": rooms.imported(hidden)})
    assert {"ptx_emulator.core.state", "ptx_emulator.core.execute"} <= {*found}


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
    """CONTRIBUTING.md says how many lines a file may have: the one place."""
    said = re.search(r"[Ff]iles of at most (\d+) lines", (ROOT / "CONTRIBUTING.md").read_text())
    assert said, "CONTRIBUTING.md no longer says 'Files of at most N lines'"
    folders = ("cast", "cast_kernels", "csrc", "benchmarks", "docs", "examples", "tests", "tools")
    files = [*(p for folder in folders for p in (ROOT / folder).rglob("*")), *ROOT.glob("*.py")]
    long = {
        str(p.relative_to(ROOT)): n
        for p in files
        if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") and (n := len(p.read_text().splitlines())) > int(said[1])
    }
    assert long == {}
