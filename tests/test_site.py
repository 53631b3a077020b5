"""The documentation site builds without a warning, has what it must, and asks nothing of another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from html import unescape
from importlib import import_module
from pathlib import Path

import draw_pictures
import pytest
import torch
from website import bytes as where_bytes_go
from website import windows

import cast_kernels

ROOT = Path(__file__).parent.parent
PACKAGES = ("cast", "cast_kernels", "ptx_emulator", "ptx_emulator.triton")
_LOADS = re.compile(r"""<(?:script|img|iframe|source)[^>]+src="([^"]+)"|<link[^>]+href="([^"]+)"|url\(([^)]+)\)""")


def build(out: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / "tools/build_site.py"), "--out", str(out), *map(str, options)]
    return subprocess.run(words, cwd=out.parent, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    done = build(out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"open {out / 'index.html'}\n"
    return out


def test_every_document_is_a_page(site: Path) -> None:
    documents = [path for folder in ("docs", "benchmarks") for path in (ROOT / folder).rglob("*.md")]
    assert len(documents) > 30
    for path in [*documents, ROOT / "examples/README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        assert (site / path.relative_to(ROOT).with_suffix(".html")).is_file(), path
    assert "docs/index.html" in (site / "index.html").read_text()


def test_the_public_names_have_a_place(site: Path) -> None:
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]  # after four lines of comment
    found = {line.split(" py:")[0] for line in zlib.decompress(packed).decode().splitlines() if " py:" in line}
    for package in PACKAGES:
        assert {f"{package}.{name}" for name in import_module(package).__all__} <= found
    assert {"cast.CAST.forward", "cast_kernels.Stream.up_weight", "cast_kernels.BCAST.forward"} <= found


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    loaded = set()
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        loaded |= {part.strip("\"'") for hit in _LOADS.findall(page.read_text()) for part in hit}
    assert [target for target in loaded if re.match(r"(\w+:)?//", target)] == []
    assert any("searchtools.js" in target for target in loaded)
    assert any("furo.css" in target for target in loaded)


def test_the_search_needs_no_server(site: Path) -> None:
    """A browser lets a page of a disk run a script, but read no file: the index is a script."""
    index = (site / "searchindex.js").read_text()
    assert index.startswith("Search.setIndex(")
    assert all(f'"{word}":' in index or f"{word}:" in index for word in ("bottleneck", "drop", "wilson"))


def test_the_commands_are_what_help_prints(site: Path) -> None:
    page = (site / "docs/reference/commands.html").read_text()
    for name in ("demo", "train", "evaluate", "predict", "export", "study", "pretrain", "data"):
        assert f'id="cast-{name}"' in page
    assert 'id="cast-kernels-gpu-check"' in page
    assert 'id="python--m-ptx_emulator-run"' in page
    assert 'read "cuda" in calls of PyTorch as "cpu"' in unescape(page)
    assert "directory for videos, checkpoints, metrics.json and report.html" in page


def test_files_that_are_no_pages_are_named(site: Path) -> None:
    page = (site / "benchmarks/results/README.html").read_text()
    assert '<span class="pre">benchmarks/results/bcast_zen3.json</span></code>' in page
    assert not list(site.rglob("*.json"))


def test_the_first_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "docs/index.md").read_text(), re.S | re.M)
    assert code is not None
    exec(code[1], {})
    assert "backend='auto' runs: cpu\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["tests/rooms.py", *(f"tools/{path.name}" for path in sorted((ROOT / "tools").glob("*.py")))]
)
def test_help_of_a_developers_command_does_nothing_else(name: str, tmp_path: Path) -> None:
    """Run from a copy of the file, so that what it writes beside itself is seen as well."""
    inside = tmp_path / name
    inside.parent.mkdir()
    inside.write_text((ROOT / name).read_text())
    paths = [str(ROOT), *(str(ROOT / folder) for folder in ("benchmarks", "tools"))]
    done = subprocess.run(
        [sys.executable, "-B", str(inside), "--help"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ":".join(paths)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [inside]


def test_the_committed_pictures_are_what_is_drawn(tmp_path: Path) -> None:
    draw_pictures.draw(tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {name: (ROOT / "docs/pictures" / name).read_text() for name in drawn}
    assert len(drawn) == len(cast_kernels.WINDOWS) + 1


@pytest.mark.parametrize("window", cast_kernels.WINDOWS)
def test_the_window_in_a_picture_is_the_one_that_attends(window: str) -> None:
    """A token's gradient reaches those of its window, through the product's mathematics, and no other."""
    module = cast_kernels.BCAST(4, 4, 1, windows.FRAMES, windows.SIDE**2, (window, "time"), ("t2s",), backend="eager")
    torch.nn.init.normal_(module.cross_s_up.weight)
    temporal = torch.randn(1, windows.FRAMES, windows.SIDE**2, 4, requires_grad=True)
    spatial = torch.randn(1, windows.FRAMES, 1 + windows.SIDE**2, 4)
    frame, row, column = windows.CHOSEN
    module(spatial, temporal)[0][0, frame, 1 + row * windows.SIDE + column].sum().backward()
    assert temporal.grad is not None
    reached = temporal.grad.flatten(0, 2).abs().sum(-1).nonzero().flatten().tolist()
    assert set(reached) == windows.together(window)


def test_the_bytes_agree_with_the_documents() -> None:
    """Kept a clip as docs/ops/bcast.md has it, moved as docs/triton.md has it."""
    published, tuned, *ours = where_bytes_go.rows()
    assert [round(row.kept / where_bytes_go.CLIPS / 2**20, 1) for row in ours] == [13.9, 4.7, 0.0]
    moved = [round(amount / 1e6) for amount in (published.forward, tuned.forward, tuned.backward, ours[1].backward)]
    text = (ROOT / "docs/triton.md").read_text()
    assert moved == [884, 527, 980, 725]
    assert all(f" {figure}" in text for figure in moved)


PAGE = """# Toy
[a page](other.md), [a heading](#nothing), [a lost file](../gone.json), [a file](../data.json)

```{eval-rst}
.. automodule:: toy
```
"""
MODULE = '''"""Toy, of docs/gone.md."""

from dataclasses import dataclass

__all__ = ["Kind", "f", "g"]


def f():
    """See :func:`toy.nothing`."""


def g():
    pass


@dataclass
class Kind:
    """Told."""

    field: int

    def way(self):
        pass
'''


def test_what_is_broken_fails(tmp_path: Path) -> None:
    """A repository of two pages and a module, with our settings; what is right in it is shown all the same."""
    settings = (ROOT / "docs/conf.py").read_text()
    settings += f'sys.path[:0] = ["{ROOT}/tools"]\npublic_packages = ["toy"]\n'
    files = {
        "docs/conf.py": settings, "docs/site.css": "", "docs/index.md": PAGE, "docs/alone.md": "# In no list\n",
        "data.json": "{}", "toy.py": MODULE,
    }  # fmt: skip
    (tmp_path / "docs").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = build(tmp_path / "out", "--root", tmp_path, "--repository", "https://host/us/it/blob/main")
    assert done.returncode != 0
    assert "open " not in done.stdout
    for complaint in (
        "'other.md'", "'nothing'", "gone.json", "toy.nothing", "unknown document: '/docs/gone'",
        "document isn't included in any toctree", "toy.g is public, but no page has it", "toy.g is public, but has no",
        "toy.Kind.field is public, but", "toy.Kind.way is public, but",
    ):  # fmt: skip
        assert complaint in done.stderr, f"{complaint}\n{done.stderr}"
    assert 'href="https://host/us/it/blob/main/data.json"' in (tmp_path / "out/docs/index.html").read_text()
