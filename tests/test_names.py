"""What documents, messages and comments name exists: files, modules and their members, commands, options, extras."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import re
import tomllib
from functools import cache
from pathlib import Path

from cast import cli as cast_cli
from cast_kernels import cli as kernels_cli

ROOT = Path(__file__).parent.parent
FOLDERS = ("cast", "cast_kernels", "csrc", "docs", "recipes", "benchmarks", "tools", "tests", "examples")
KINDS = (".py", ".h", ".cpp", ".cu", ".md", ".yaml", ".sh", ".json", ".txt", ".toml")


@cache
def files() -> dict[str, Path]:
    """Every file of the repository by its path from the root."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    found = [path for path in [*ROOT.iterdir(), *inside] if path.is_file()]
    return {str(path.relative_to(ROOT)): path for path in found}


DOCUMENTS = [name for name in files() if name.endswith(".md")]
SOURCES = [
    name
    for name in files()
    if name.endswith((".py", ".h", ".cpp", "CMakeLists.txt", ".sh", ".yaml")) and not name.startswith("tests/faults")
]
#: Options of programs that are not ours.
FOREIGN = {
    *("--benchmark-only", "--benchmark-disable-gc", "--benchmark-json"),  # pytest-benchmark
    *("--multi_gpu", "--fsdp_version"),  # accelerate
    *("--no-build-isolation", "--no-deps", "--force-reinstall", "--no-index"),  # pip
    *("--build", "--inplace"),  # CMake, setuptools
    *("--error-exitcode", "--tool"),  # compute-sanitizer
    *("--fmad", "--regAllocOptLevel", "--gpu-name"),  # ptxas
    *("--keep-going", "--data-binary"),  # Sphinx, curl
    *("--print_config", "--key"),  # jsonargparse, and what it reads of a recipe's keys
}
_PATH = re.compile(
    rf"(?<![\w./<{{-])(?:{'|'.join(FOLDERS)})/[\w*.{{}}<>/-]*[\w*>}}](?:{'|'.join(map(re.escape, KINDS))})\b"
)
_MEMBER = re.compile(r"(?<![\w./-])(?:cast|cast_kernels|ptx_emulator)(?!\.md\b)(?:\.[A-Za-z_]\w*)+\b(?![/-])")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
_EXTRA = re.compile(r"(?:cast-kernels|['\" ]\.)\[([a-z,-]+)\]")
_COMMAND = re.compile(r"(?<![\w./-])cast-kernels ([a-z][a-z-]+)")
#: Single names in documents that are others': of their packages, files, instructions, or of the mathematics.
OTHERS = """
    CHECKPOINT _000010_000020 update_freq augreg openai perf TRITON_DEBUG vdpbf16ps v_mfma_f32 spectral_norm f_s f_t
    shared_storage_dqdkdv Int8DynamicActivationInt8WeightConfig Int8WeightOnlyConfig merge_adapter unmerge_adapter
    merge_and_unload disable_adapter libgomp1 CUtensorMap _cast_kernels_cuda_
"""
_NAME = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)*)(?:\(\))?`")
_FILE = re.compile(r"`([\w./*<>-]+\.(?:py|h|cpp|cu|sh))`")


def strings(path: Path) -> list[str]:
    """A Python file's strings, docstrings among them; what an f-string fills in is `{}`."""
    tree = ast.parse(path.read_text())
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in joined for part in ast.walk(node)}
    whole = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in inside]
    filled = ["".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values) for node in joined]
    return [text for text in (*whole, *filled) if isinstance(text, str)]


@cache
def text_of(name: str) -> str:
    return files()[name].read_text()


def missing_paths(text: str) -> list[str]:
    """Files that are named with their folder and do not exist. A name with a gap in it is a pattern."""
    named = {re.sub(r"<[^>]*>|\{[^}]*\}", "*", found) for found in _PATH.findall(text)}
    return sorted(name for name in named if name not in files() and not fnmatch.filter(files(), name))


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module of ours, or a member of one or of what lies in it."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            if not hasattr(value, name):
                return name in getattr(value, "__annotations__", {}) and name == parts[-1]
            value = getattr(value, name)
        return True
    return False


PRODUCT = [name for name in SOURCES if name.endswith(".py") and not name.startswith("tests/")]


@cache
def said(name: str) -> str:
    """What a document or a Python file says to a reader: all of the one, the strings of the other."""
    return text_of(name) if name in DOCUMENTS else "\n".join(strings(files()[name]))


@cache
def options() -> frozenset[str]:
    """Of our commands, programs and tests."""
    found = {
        found
        for name in SOURCES
        for found in re.findall(r"""add(?:_argument|option)\(\s*["'](--[\w-]+)""", text_of(name))
    }
    for parser in (cast_cli._parser()[0], kernels_cli._parser()):
        subparsers = next(a for a in parser._actions if isinstance(a.choices, dict))
        for own in subparsers.choices.values():
            found |= {option for action in own._actions for option in action.option_strings}
    # examples/serve.py makes an option of each field of its limits.
    classes = [node for node in ast.parse(text_of("examples/serve.py")).body if isinstance(node, ast.ClassDef)]
    (limits,) = (node for node in classes if node.name == "Limits")
    fields = [ast.unparse(node.target) for node in limits.body if isinstance(node, ast.AnnAssign)]
    found |= {f"--{field.replace('_', '-')}" for field in fields}
    return frozenset(found)


def test_files_that_are_named_exist() -> None:
    """Documents and sources name files from the root. Some tests name such as are not to be there."""
    names = {*DOCUMENTS, *SOURCES} - {f"tests/test_{stem}.py" for stem in ("build", "heavy", "names", "site")}
    assert {name: missing for name in names if (missing := missing_paths(text_of(name)))} == {}


def test_what_is_named_with_its_module_exists() -> None:
    named = {found: name for name in (*DOCUMENTS, *PRODUCT) for found in _MEMBER.findall(said(name))}
    assert len(named) > 50
    assert {found: name for found, name in named.items() if not resolves(found)} == {}


def test_commands_options_and_extras_that_are_named_exist() -> None:
    """Of commands in documents tests/test_documents.py parses the options, too."""
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    for name in (*DOCUMENTS, *PRODUCT):
        text = said(name)
        assert set(_COMMAND.findall(text)) <= kernels_cli.COMMANDS.keys(), name
        assert {extra for found in _EXTRA.findall(text) for extra in found.split(",")} <= extras.keys(), name
        if name in PRODUCT:
            assert set(_OPTION.findall(text)) - options() - FOREIGN == set(), name


@cache
def words() -> frozenset[str]:
    """Of all sources and their names."""
    texts = [text_of(name) for name in {*SOURCES, "pyproject.toml"} - {"tests/test_names.py"}]
    return frozenset(word for text in (*texts, *files()) for word in re.findall(r"\w+", text))


def false_names(text: str) -> list[str]:
    """Single names and files in backticks that no source has. A file may be named from any folder on its way."""
    data = (".csv", ".json", ".jsonl", ".yaml", ".md", ".txt", ".html", ".mp4", ".safetensors", *KINDS)
    names = [name for name in _NAME.findall(text) if not name.endswith(data) and not name.startswith("grad.")]
    wrong = [name for name in names if not set(name.split(".")) <= words() | set(OTHERS.split())]
    patterns = {found: re.sub(r"<[^>]*>", "*", found) for found in _FILE.findall(text)}
    return wrong + [name for name, pattern in patterns.items() if not fnmatch.filter(_rooted(), f"*/{pattern}")]


@cache
def _rooted() -> tuple[str, ...]:
    return tuple(f"/{name}" for name in files())


def test_what_documents_name_in_backticks_exists() -> None:
    assert {name: wrong for name in DOCUMENTS if (wrong := false_names(text_of(name)))} == {}


def test_a_false_name_is_found() -> None:
    text = "see docs/gone.md, cast/<op>.py, cast_kernels/ops/*.py and csrc/cpu/pack.h; `cast_kernels.ops.bcast.gone`"
    assert missing_paths(text) == ["docs/gone.md"]
    assert false_names("`plans.Plan`, `ops/<op>.py`, `plain.gone_`, `Gone()`, `launch.py` and `gone.h`") == [
        "plain.gone_",
        "Gone",
        "gone.h",
    ]
    assert not resolves("cast_kernels.ops.bcast.gone")
    assert resolves("cast_kernels.evidence.cases.Case.seed")
    assert not {"--resumee"} & options()
    assert {"--resume", "--cache", "--sampling", "--minutes"} <= options()
