"""Build the documentation site: `python tools/build_site.py [--out FOLDER] [--repository ADDRESS]`.

Every fault is an error: a link or cross reference without a target, a page that no list names, a public name without a
docstring. The site needs no server and no network: open FOLDER/index.html. A second build reads only changed files;
`FOLDER-cache` keeps the others' contents.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).resolve().parent.parent
#: The site has the folders of the sources, so its first page is one folder deeper than the entry.
_ENTRY = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=docs/index.html">\n'


def build(root: Path, out: Path, repository: str) -> int:
    """Write the site of a repository into a folder, and return Sphinx's exit code: 0 only without a warning."""
    words = ["-q", "-W", "--keep-going", "-c", str(root / "docs"), "-d", str(out.with_name(f"{out.name}-cache"))]
    out.mkdir(parents=True, exist_ok=True)
    code = sphinx([*words, "-D", f"repository={repository}", str(root), str(out)])
    (out / "index.html").write_text(_ENTRY)
    print(f"open {out / 'index.html'}" if code == 0 else f"{out} is incomplete: mend what is named above")
    return code


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Build the documentation site; any warning is an error.")
    parser.add_argument("--out", type=Path, default=ROOT / "build/site", help="folder to write into (%(default)s)")
    parser.add_argument("--repository", default="", help="address of the repository's files, for links to sources")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository whose docs/ is built (%(default)s)")
    options = parser.parse_args()
    return build(options.root.resolve(), options.out.resolve(), options.repository)


if __name__ == "__main__":
    sys.exit(main())
