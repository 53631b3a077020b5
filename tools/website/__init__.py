"""Sphinx extensions for this repository's documents and docstrings."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

from website import commands, docstrings, links


def setup(app: Sphinx) -> dict[str, Any]:
    """Set up the extension; Sphinx calls this."""
    app.add_config_value("repository", "", "env")
    app.add_config_value("public_packages", [], "env")
    links.setup(app)
    docstrings.setup(app)
    commands.setup(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
