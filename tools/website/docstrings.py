"""Additions to autodoc: links to pages, comments of exported constants, and a check for missing docstrings."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

_PAGE = re.compile(r"(?<![\w/])docs/([\w/]+)\.md")
_VALUES = ("data", "attribute", "property")
_SECTION = re.compile(r"(Args|Returns|Raises):$")
_log = logging.getLogger(__name__)


@cache
def homes(package: str) -> dict[str, str]:
    """Exported name -> the module that it is imported from."""
    tree = ast.parse(Path(inspect.getfile(import_module(package))).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: str(node.module) for node in imports for alias in node.names}


def comment(package: str, name: str) -> list[str]:
    """The `#:` comment of a constant, in the module that defines it."""
    home = homes(package).get(name, package)
    return ModuleAnalyzer.for_module(home).find_attr_docs().get(("", name), [])


class _Comments:
    """Keeps napoleon from reading "word: text" in the comment of a constant, field or property as a type."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def before(self, app: Sphinx, what: str, name: str, given: object, options: object, lines: list[str]) -> None:
        package, _, last = name.rpartition(".")
        if what == "data" and package in app.config.public_packages:
            lines[:] = comment(package, last)
        self._lines = list(lines)

    def after(self, app: Sphinx, what: str, name: str, given: object, options: object, lines: list[str]) -> None:
        if what in _VALUES and not any(_SECTION.match(line) for line in self._lines):
            lines[:] = self._lines
        lines[:] = [_PAGE.sub(r":doc:`/docs/\1`", line) for line in lines]


def _signature(
    app: Sphinx, what: str, name: str, given: Any, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A class's signature from its constructor: a base may have a `__new__` with any arguments."""
    if what != "class" or signature != "(*args, **kwargs)":
        return signature, returns
    parameters = list(inspect.signature(given.__init__).parameters.values())[1:]
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(plain)), returns


def _by_last_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.Element) -> nodes.Element | None:
    """The target of a docstring's short name from another module, if exactly one object of the site ends with it."""
    if node.get("refdomain") != "py":
        return None
    objects = env.domains.python_domain.objects
    found = {entry.node_id: entry for name, entry in objects.items() if f".{name}".endswith(f".{node['reftarget']}")}
    if len(found) != 1:
        return None
    (entry,) = found.values()
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, shown)


def undocumented(package: str, name: str) -> Iterator[str]:
    """Names without a docstring: an exported name, or its public functions, methods and fields."""
    given = getattr(import_module(package), name)
    if inspect.ismodule(given):
        functions = [
            (key, x) for key, x in vars(given).items() if inspect.isfunction(x) and x.__module__ == given.__name__
        ]
        members = [key for key, function in functions if not function.__doc__ and not key.startswith("_")]
    elif inspect.isclass(given):
        members = list(_bare(given))
    else:
        members = []
    constant = not (inspect.ismodule(given) or inspect.isclass(given) or inspect.isroutine(given))
    if not (comment(package, name) if constant else given.__doc__):
        yield f"{package}.{name}"
    yield from (f"{package}.{name}.{member}" for member in members)


def _bare(kind: type) -> Iterator[str]:
    """Public methods, properties and fields of a class without a text. The class's docstring may describe fields."""
    comments = ModuleAnalyzer.for_module(kind.__module__).find_attr_docs()
    told = {name for owner, name in comments if owner == kind.__qualname__}
    told |= set(re.findall(r"^ +(\w+):", kind.__doc__ or "", re.M))
    members = {name: getattr(x, "__func__", x) for name, x in vars(kind).items() if not name.startswith("_")}
    functions = {name: x for name, x in members.items() if isinstance(x, property) or inspect.isfunction(x)}
    yield from (name for name, function in functions.items() if not function.__doc__)
    if is_dataclass(kind) or issubclass(kind, tuple):  # other classes' annotations are for type checkers
        fields = inspect.get_annotations(kind)
        yield from (name for name in fields if not name.startswith("_") and name not in told)


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    shown = env.domains.python_domain.objects
    for package in app.config.public_packages:
        for name in import_module(package).__all__:
            if f"{package}.{name}" not in shown:
                _log.warning(f"{package}.{name} is public, but no page has it")
            for missing in undocumented(package, name):
                _log.warning(f"{missing} is public, but has no docstring")


def setup(app: Sphinx) -> None:
    comments = _Comments()
    app.connect("autodoc-process-docstring", comments.before, priority=400)  # napoleon has priority 500
    app.connect("autodoc-process-docstring", comments.after, priority=600)
    app.connect("autodoc-process-signature", _signature)
    app.connect("missing-reference", _by_last_name)
    app.connect("env-check-consistency", _check)
