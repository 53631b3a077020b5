"""The package for the kernels hub: written by the command, loaded by `kernels` where ours is not, run, compared."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import hub_package
import pytest
import torch
from bcast_cases import Case, assert_at_most_twice_eager, run
from kernels._rust import Digest, DigestAlgorithm, DigestValidationError, Metadata

ROOT = Path(__file__).parent.parent
CASE = Case(batch=1, dim=32, bottleneck=32, heads=2)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "cast-kernels"
    assert hub_package.main([str(out)]) == 0
    return out


@pytest.mark.slow
def test_kernels_loads_it_where_ours_is_not_and_it_is_right(package: Path, tmp_path: Path) -> None:
    exact = run(CASE, torch.float64, None)
    grads = CASE.output_grads(torch.float32)
    sizes = {
        "dim": CASE.dim, "bottleneck_dim": CASE.bottleneck, "num_heads": CASE.heads, "num_frames": CASE.frames,
        "num_patches": CASE.patches, "windows": CASE.windows,
    }  # fmt: skip
    torch.save(
        {"sizes": sizes, "state": CASE.module().state_dict(), "inputs": CASE.inputs(), "grads": grads},
        tmp_path / "problem.pt",
    )
    command = [sys.executable, str(ROOT / "tests/hub_process.py"), package, tmp_path / "problem.pt", tmp_path / "out"]
    offline = {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = torch.load(tmp_path / "out")
    assert told["ours"] == [], "modules of ours were imported"
    assert_at_most_twice_eager(told["found"]["triton"], told["found"]["eager"], exact)
    assert not torch.equal(told["found"]["triton"]["spatial"], told["found"]["eager"]["spatial"]), "one path"
    assert "a package of the hub has none; pip install cast-kernels" in told["native"]
    assert told["beside"]
    assert told["operators"] == sorted(["cast_kernels", told["name"]])
    assert told["packets"] == ["cast_kernels.bcast", f"{told['name']}.bcast"]


def test_the_metadata_describes_the_files(package: Path) -> None:
    folders = sorted((package / "build").iterdir())
    assert [folder.name for folder in folders] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    read = [Metadata.read_from_file(folder / "metadata.json") for folder in folders]
    assert len({metadata.id for metadata in read}) == 3
    for folder, metadata in zip(folders, read, strict=True):
        assert metadata.id.isidentifier()
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
    (package / "build/torch-rocm/plain.py").write_text("")
    with pytest.raises(DigestValidationError):
        read[2].digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folders[2]))


def test_it_imports_itself_torch_triton_and_the_standard_library(package: Path) -> None:
    names = set()
    for path in (package / "build/torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add((node.module or "").partition(".")[0])
    asked_by_name = {"flash_attn", "xformers"}  # attention="flash_attn": a user's choice, imported then
    assert names - sys.stdlib_module_names - asked_by_name == {"torch", "triton"}


def test_no_compiled_file_travels_and_the_record_says_so(package: Path) -> None:
    assert not [path for path in package.rglob("*") if path.suffix in (".so", ".pyd", ".pyc")]
    assert json.loads((package / "build/torch-cpu/_build.json").read_text())["cpu"]["built"] is False


@pytest.mark.parametrize(
    ("name", "source", "becomes"),
    [
        ("a.py", "from cast_kernels import b", "from . import b"),
        ("a.py", "from cast_kernels.b import (\n    c,\n)", "from .b import (\n    c,\n)"),
        ("ops/a.py", "def f():\n    from cast_kernels.ops._b import c", "def f():\n    from ..ops._b import c"),
        ("a.py", "import cast_kernels.b  # first", "from . import b  # first"),
        ("ops/a.py", "import cast_kernels.ops.b as c", "from ..ops import b as c"),
        ("a.py", "import cast_kernels_more\n'cast_kernels.b'", "import cast_kernels_more\n'cast_kernels.b'"),
    ],
)
def test_imports_become_relative(name: str, source: str, becomes: str) -> None:
    assert hub_package.relative(source, name) == becomes


@pytest.mark.parametrize("source", ["import cast_kernels", "import cast_kernels.b, os", "x = cast_kernels.b"])
def test_what_has_no_relative_form_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"^ops/a\.py:1 "):
        hub_package.relative(source, "ops/a.py")


def test_bad_usage_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], [str(tmp_path)]):
        with pytest.raises(SystemExit) as ended:
            hub_package.main(words)
        assert ended.value.code == 2
    assert "exists; name a folder that does not" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
