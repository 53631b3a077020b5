"""Sphinx's settings of the documentation site; `python tools/build_site.py` builds it.

The source folder is the repository's root, so that a link between two documents is the same here and in the
repository's own rendering. Read are `docs/`, the documents of `benchmarks/`, `examples/` and the emulator, and two
pages beside them: how to contribute, and what changed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

#: Address of the repository's files on the web, to which links to files outside the site then lead, for example
#: `https://host/owner/name/blob/main`; without one the site shows their paths. Also `-D repository=...`.
repository = ""

project, author = "CAST kernels", "the CAST kernels contributors"
root_doc = "docs/index"
include_patterns = ["docs/**.md", "benchmarks/**.md", "examples/README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
include_patterns += ["tools/ptx_emulator/README.md"]
exclude_patterns = [
    path.name for path in ROOT.iterdir() if not path.name.startswith(("docs", "benchmarks", "examples", "tools", "C"))
]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "website"]

#: Packages whose `__all__` is public: each name needs a docstring and a place in docs/reference.
public_packages = ["cast", "cast_kernels", "ptx_emulator", "ptx_emulator.triton"]

# Docstrings have single backticks for code, as Markdown has.
default_role = "code"
smartquotes_action = "D"  # dashes; '"auto"' is a value
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_numpy_docstring = False

# The repository's rendering makes an anchor of every heading.
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page may begin with a table's comment, or skip a level as reports do

nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|collections|typing|pathlib|os|enum)\..*|Tensor"),  # their documents are elsewhere
    # Aliases: a path, two words, a function, three models; a TypeVar; a class whose name here has no module before it.
    (r"py:class", r"PathLike|Sampling|Function|Model|.*\.AnyLauncher|Ensemble"),
]

html_theme = "furo"
html_title = "CAST kernels"
html_copy_source = False
html_show_sphinx = html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
