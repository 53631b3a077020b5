"""Links to files of the repository that are no pages of the site: sources, results as JSON, folders."""

from __future__ import annotations

import os
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class RepositoryLinks(SphinxTransform):
    """Point such links to the repository on the web if its address is known; otherwise show the path."""

    default_priority = 100

    def apply(self) -> None:
        links = addnodes.download_reference | addnodes.pending_xref
        for node in list(self.document.findall(lambda node: isinstance(node, links))):
            path = self._path(node)
            if path is not None:
                node.replace_self(self._shown(node, path))

    def _path(self, node: nodes.Element) -> str | None:
        """The path from the repository's root, if the node links to a file that is no page."""
        if node.get("reftype") != "myst" or node.get("refdomain") or "://" in node["reftarget"]:
            return None
        root, page = Path(self.env.srcdir), Path(self.env.doc2path(self.env.docname))
        target = Path(os.path.normpath(page.parent / node["reftarget"].partition("#")[0]))
        return str(target.relative_to(root)) if target.is_relative_to(root) and target.exists() else None

    def _shown(self, node: nodes.Element, path: str) -> list[nodes.Node]:
        if self.config.repository:
            address = f"{self.config.repository.rstrip('/')}/{path}"
            return [nodes.reference("", "", *_words(node), refuri=address, internal=False)]
        literal = nodes.literal(path, path)
        if path.rstrip("/").endswith(node.astext().rstrip("/")):
            return [literal]
        return [*_words(node), nodes.Text(" ("), literal, nodes.Text(")")]


def _words(node: nodes.Element) -> list[nodes.Node]:
    """The link's own text."""
    inner = node.children[0] if len(node.children) == 1 and isinstance(node.children[0], nodes.inline) else node
    return [child.deepcopy() for child in inner.children]


def setup(app: Sphinx) -> None:
    app.add_transform(RepositoryLinks)
