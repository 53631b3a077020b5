"""Write `cast_kernels` as a repository for the package `kernels`: `python tools/hub_package.py OUT`.

docs/hub.md describes its contents, and omissions with their reasons.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "cast_kernels"
NAME = "cast-kernels"
#: Version of the repository's interface. For the hub, 0 is one that may still change.
VERSION = 0
#: The oldest `kernels` that reads this layout: no second folder inside a variant, a digest in the metadata.
OLDEST_KERNELS = "0.17.0"
#: Parts that are no operations: commands, developers' tools, first runs on a GPU. They import more than torch.
LEFT_OUT = ("evidence", "gpu", "cli.py", "info.py", "__main__.py")
#: Variants with only Python and Triton, and the architectures of the compiled kernels in `docs/evidence.md`. Triton
#: compiles on the user's machine, so "+PTX" includes newer NVIDIA GPUs.
VARIANTS: dict[str, list[str] | None] = {"cpu": None, "cuda": ["8.0+PTX"], "rocm": ["gfx942"]}
NOT_BUILT = {"cpu": {"built": False, "reason": f"a package of the hub has none; pip install {NAME} has it"}}

CARD = f"""---
license: apache-2.0
tags: [kernels, pytorch]
---
# {NAME}
The operations of CAST, the two-stream video transformer, in Python and Triton: `bcast`, `self_attention`, `ffn`,
`adapter`, and the module `BCAST`. Needs Python 3.11, torch 2.10, kernels {OLDEST_KERNELS}; Triton 3.6 on a GPU. No
kernel has run on a GPU yet: they were compiled, and executed in emulation.

```python
import kernels
ops = kernels.get_kernel("<owner>/{NAME}", version={VERSION}, trust_remote_code=True)
exchange = ops.BCAST(dim=768, bottleneck_dim=384, num_heads=12, num_frames=8, num_patches=196)
```
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the package and return 0; bad usage ends in SystemExit with 2."""
    parser = argparse.ArgumentParser(description=f"Write {PACKAGE} as a repository that the package `kernels` loads.")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    out = parser.parse_args(arguments).out
    if out.exists():
        parser.error(f"{out} exists; name a folder that does not, or remove it")
    files = sources(ROOT / PACKAGE)
    for backend, architectures in VARIANTS.items():
        write_variant(out / "build" / f"torch-{backend}", backend, architectures, files)
    (out / "README.md").write_text(CARD)
    shutil.copy(ROOT / "LICENSE", out)
    print(f"{len(files)} files in each of {len(VARIANTS)} variants under {out / 'build'}")
    return 0


def sources(package: Path) -> dict[str, bytes]:
    """The files of a variant by path, with relative imports, because the hub renames the package."""
    paths = {str(path.relative_to(package)): path for path in sorted(package.rglob("*.py"))}
    kept = {name: path for name, path in paths.items() if name.split("/")[0] not in LEFT_OUT}
    files = {name: relative(path.read_text(), name).encode() for name, path in kept.items()}
    return files | {"py.typed": b"", "_build.json": json.dumps(NOT_BUILT, indent=2).encode() + b"\n"}


def relative(source: str, name: str) -> str:
    """The module's source with its imports from the package made relative.

    Args:
        source: of a module.
        name: its path in the package, such as "ops/bcast.py".

    Raises:
        ValueError: it uses the package by name outside of an import, or its import has no relative form.
    """
    lines, up = source.split("\n"), "." * (name.count("/") + 1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id == PACKAGE:
            raise ValueError(f"{name}:{node.lineno} uses {PACKAGE} by its name, which the hub changes; import from it")
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _ours(node.module or ""):
            inner = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
            _replace(lines, node, rf"from {re.escape(node.module or '')} import", f"from {up}{inner} import")
        elif isinstance(node, ast.Import) and any(_ours(alias.name) for alias in node.names):
            whole = ", ".join(alias.name for alias in node.names)
            folder, _, module = whole.removeprefix(f"{PACKAGE}.").rpartition(".")
            if len(node.names) > 1 or whole == PACKAGE:
                raise ValueError(f"{name}:{node.lineno} has `import {whole}`; import each module of ours by itself")
            _replace(lines, node, rf"import {re.escape(whole)}\b", f"from {up}{folder} import {module}")
    return "\n".join(lines)


def _ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE


def _replace(lines: list[str], node: ast.stmt, pattern: str, text: str) -> None:
    """Replace the beginning of the statement."""
    line = lines[node.lineno - 1]
    head, tail = line[: node.col_offset], line[node.col_offset :]
    lines[node.lineno - 1] = head + re.sub(f"^{pattern}", text, tail)


def write_variant(folder: Path, backend: str, architectures: list[str] | None, files: dict[str, bytes]) -> None:
    """Write the files and `metadata.json`. The identifier is their hash and becomes the package's name when loaded."""
    digests = {name: hashlib.sha256(content).digest() for name, content in sorted(files.items())}
    content = hashlib.sha256(b"".join(name.encode() + digest for name, digest in digests.items())).hexdigest()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    metadata = {
        "id": f"_{PACKAGE}_{backend}_{content[:12]}",
        "name": NAME,
        "version": VERSION,
        "kernels-minver": OLDEST_KERNELS,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend} | ({"archs": architectures} if architectures else {}),
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
