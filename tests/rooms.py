"""Who may import whom: the rules that tests/test_architecture.py checks, and from which docs/architecture.md is made.

python tests/rooms.py        # writes the tables of docs/architecture.md anew
"""

from __future__ import annotations

import ast
from argparse import ArgumentParser
from functools import cache
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- made by tests/rooms.py from its rules -->\n", "<!-- end of what tests/rooms.py makes -->\n"
#: First part of a module's name -> its folder; a folder in another one comes before it. Those of BARE hold files that
#: are imported without that part.
FOLDERS = {
    "cast_kernels": "cast_kernels",
    "cast": "cast",
    "ptx_emulator": "tools/ptx_emulator",
    "ptx_emulator_pytest": "tools/ptx_emulator_pytest",
    "first_contact": "tools/first_contact",
    "benchmarks": "benchmarks",
    "tests": "tests",
    "website": "tools/website",
    "tools": "tools",
    "examples": "examples",
}
BARE = ("benchmarks", "tests", "tools", "examples")


class Room(NamedTuple):
    """A package, a module, or a folder of them, with one rule."""

    name: str
    purpose: str
    imports: str = ""  # rooms; of its own package without the package's name. A package's name: its public names

    def allowed(self) -> tuple[str, ...]:
        """The rule's imports as whole names."""
        package = self.name.split(".")[0]
        names = self.imports.split()
        return tuple(name if name.split(".")[0] in FOLDERS else f"{package}.{name}" for name in names)

    def row(self) -> str:
        """Its line of the page."""
        name = self.name.split(".")[-1] if self.name.startswith("cast") else self.name
        shown = [f"`{other}`" for other in self.imports.split() if other != self.name.split(".")[-1]]
        return f"| `{name}` | {self.purpose} | {', '.join(shown) or '-'} |"


#: In the order of the page: what imports little first.
ROOMS = (
    Room("cast_kernels.problem", "what a problem is; the order of parameters"),
    Room("cast_kernels.reference", "the mathematics: the definition of correct"),
    Room("cast_kernels.plans", "the interface of backends' plans: allocations, launches"),
    Room("cast_kernels.versions", "the oldest torch and Triton that work"),
    Room("cast_kernels.assemblers", "which ptxas Triton takes; releases that are known to be wrong"),
    Room("cast_kernels.compiling", "a mark that torch.compile reads"),
    Room("cast_kernels.attention", "which attention runs, and why", "problem compiling"),
    Room("cast_kernels.plain", "may an op read a layer's weights, or must it call it", "problem compiling"),
    Room("cast_kernels._native", "the native core and the CUDA kernels, or why there are none", "_C _cuda"),
    Room("cast_kernels.eager", "backend: PyTorch's operators", "problem attention"),
    Room("cast_kernels.cpu", "backend: native C++", "cpu problem _native"),
    Room("cast_kernels.triton", "backend: GPU kernels", "triton problem attention compiling versions"),
    Room("cast_kernels.cuda", "backend: CUDA C++ for Hopper", "cuda problem compiling _native"),
    Room("cast_kernels.recompute", 'what `recompute="auto"` means', "problem compiling cpu triton"),
    Room("cast_kernels.backends", "which backend runs a problem", "problem _native eager cpu cuda triton"),
    Room(
        "cast_kernels.ops", "checks, registered operators, public functions",
        "ops problem attention backends recompute eager triton",
    ),
    Room(
        "cast_kernels.modules", "nn.Modules with the published names",
        "modules ops problem attention plain backends recompute eager",
    ),
    Room(
        "cast_kernels", "the public names",
        "attention backends modules ops plain problem reference versions",
    ),
    Room(
        "cast_kernels.evidence", "what developers run without a GPU",
        "evidence assemblers _native triton.tiles cast_kernels ptx_emulator",
    ),
    Room(
        "cast_kernels.gpu", "what users run on one: `gpu-check`, `tune`",
        "gpu assemblers evidence triton.tiles triton.common cast_kernels",
    ),
    Room(
        "cast_kernels.info", "what was built, what runs here",
        "assemblers cast_kernels _native ops problem gpu.machine ptx_emulator.native",
    ),
    Room("cast_kernels.cli", "the command `cast-kernels`", "evidence gpu info cast_kernels"),
    Room("cast_kernels.__main__", "the same, not installed", "cli"),
    Room("cast._moved", "modules under their old names, with a warning"),
    Room("cast.ground", "what every job stands on: files, processes, optional packages, the way to the GPU", "ground"),
    Room("cast.metrics", "accuracies, comparisons, figures of the literature", "metrics ground.files"),
    Room("cast.video", "mp4 to clips; knows no model", "video ground"),
    Room(
        "cast.model", "the model: sizes, layers, experts, blocks, heads; its weights, names and directory",
        "model ground.files ground.renamed ground.sampling cast_kernels",
    ),
    Room(
        "cast.baselines", "what the paper compares with",
        "baselines model.config model.layers model.experts model.heads model.weights ground.files ground.optional "
        "ground.renamed cast_kernels",
    ),
    Room("cast.training", "engine, recipes, checkpoints", "training model baselines video ground"),
    Room(
        "cast.pretrain", "VideoMAE's pre-training; knows no CAST",
        "pretrain model.config model.layers model.positions model.experts model.weights video training "
        "ground.files ground.optional ground.transfer cast_kernels",
    ),
    Room("cast.loading", "any model from wherever it is, or several as one", "loading model baselines ground"),
    Room(
        "cast.evaluation", "the multi-view protocol, predictions, the report",
        "evaluation loading model training video metrics ground cast_kernels",
    ),
    Room("cast.predict", "names the action in a video", "predict loading baselines model video metrics ground"),
    Room("cast.export", "programs without this package", "model video ground"),
    Room("cast", "the public names", "_moved model predict"),
    Room("cast.demo", "from nothing to a report", "demo training pretrain evaluation video metrics ground cast"),
    Room(
        "cast.study", "the paper's ablation tables",
        "study demo baselines model training evaluation metrics ground cast",
    ),
    Room(
        "cast.cli", "the command `cast`",
        "video training pretrain evaluation predict export demo study ground.optional",
    ),
    Room("csrc", "C++17 and OpenMP; no torch header, a Python header only in `bindings*`"),
    Room("ptx_emulator.core", "executes compiled GPU code on a CPU; NumPy and nothing else", "core"),
    Room("ptx_emulator.native", "the same by compiled code, from csrc/ptx", "native core"),
    Room(
        "ptx_emulator.predict", "the least time of a kernel; Triton's disassemblers read its machine code",
        "predict core targets",
    ),
    Room("ptx_emulator.cuda", "launches of compiled CUDA modules as records, in files too", "cuda core"),
    Room("ptx_emulator.targets", "the architectures, and what of each decides how many kernels fit"),
    Room("ptx_emulator.triton", "checks what Triton launches; torch and Triton", "triton targets ptx_emulator"),
    Room("ptx_emulator", "its public names, and its command", "core native ptx_emulator targets triton"),
    Room("ptx_emulator_pytest", "the options of `pytest --ptx-target`; imports nothing else", "ptx_emulator.triton"),
    Room("ptx_emulator.mutants", "plants single faults in a recorded launch, one at a time", "mutants core cuda"),
    Room(
        "benchmarks", "in no package: `gpu-check` runs them from a checkout",
        "benchmarks cast cast.model.config cast.ground.optional cast.video cast_kernels cast_kernels._native "
        "cast_kernels.cli cast_kernels.gpu cast_kernels.ops ptx_emulator.targets ptx_emulator.triton",
    ),
    Room(
        "first_contact", "the first minutes with a GPU",
        "first_contact benchmarks cast_kernels.evidence cast_kernels.gpu tests.rehearsal",
    ),
    Room(
        "website", "what the documentation site needs besides Sphinx; its pictures",
        "website benchmarks.baselines cast_kernels cast_kernels.evidence cast_kernels.triton",
    ),
    Room("tools", "developers' commands: the site, its pictures, the hub's package", "website cast_kernels"),
    Room(
        "examples", "programs to copy from; no part of a package",
        "cast cast.predict cast.training cast.video cast_kernels ptx_emulator.triton",
    ),
)  # fmt: skip
_BY_NAME = {room.name: room for room in ROOMS}


@cache
def modules() -> dict[str, Path]:
    """Every Python file of ours by its module's name; those of BARE have their folder before it."""
    names: dict[Path, str] = {}
    for first, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names.setdefault(path, ".".join((first, *parts)).removesuffix(".__init__"))
    return {name: path for path, name in names.items()}


@cache
def _bare() -> dict[str, str]:
    return {name.split(".")[1]: name for name in modules() if name.split(".")[0] in BARE and name.count(".") == 1}


@cache
def imported(path: Path) -> set[str]:
    """Every module of ours that the file imports, at any depth; of a name inside a module, the module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {found for name in names if (found := module_of(name))}


def module_of(name: str) -> str:
    """The longest part of the name that is a module of ours, or nothing."""
    first, _, rest = name.partition(".")
    name = _bare()[first] + (f".{rest}" if rest else "") if first in _bare() else name
    while name and name not in modules() and name not in ("cast_kernels._C", "cast_kernels._cuda"):
        name = name.rpartition(".")[0]
    return name


def room_of(module: str) -> Room:
    """The room that the module is in.

    Raises:
        LookupError: it is in none.
    """
    name = module
    while name not in _BY_NAME:
        name = name.rpartition(".")[0]
        # A package's own rule is for its `__init__.py`, not for whatever lies in it.
        if not name or (name in ("cast", "cast_kernels")):
            raise LookupError(f"{module} is in no room: give it a line in tests/rooms.py")
    return _BY_NAME[name]


def covers(rule: str, module: str) -> bool:
    """Whether a rule's word allows the module: it is in that room, or for a package, public."""
    if rule in ("cast", "cast_kernels"):
        public = import_module(rule).__all__
        return module == rule or (module.startswith(f"{rule}.") and module.split(".")[1] in public)
    return module == rule or module.startswith(f"{rule}.")


def page(text: str) -> str:
    """The page with tables of the rules as they are here."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    headings = {"cast_kernels": "In `cast_kernels`", "cast": "In `cast`", "": "Beside the packages"}
    tables = []
    for package, rooms in groupby(ROOMS, lambda r: r.name.split(".")[0] if r.name.startswith("cast") else ""):
        lines = [room.row() for room in rooms]
        tables.append("\n".join([f"| {headings[package]} | what it is | imports |", "|---|---|---|", *lines]))
    return f"{before}{BEGIN}\n" + "\n\n".join(tables) + f"\n\n{END}{after}"


if __name__ == "__main__":
    ArgumentParser(
        description="Write the tables of docs/architecture.md anew from the rules in this file."
    ).parse_args()
    PAGE.write_text(page(PAGE.read_text()))
