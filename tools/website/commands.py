"""The directive `command-help`: the `--help` output of a command line and of each of its subcommands."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

#: Command line -> its module, which has `main` and `COMMANDS`.
PROGRAMS = {"cast": "cast.cli", "cast-kernels": "cast_kernels.cli", "python -m ptx_emulator": "ptx_emulator.command"}
_WIDTH = "84"  # columns of a page


def help_of(program: str, *words: str) -> str:
    """The text of `program ... --help`.

    Raises:
        ValueError: there is no such command.
    """
    if program not in PROGRAMS:
        raise ValueError(f"{program!r} is no command line of ours; there are {', '.join(PROGRAMS)}")
    main: Callable[[Sequence[str]], int] = import_module(PROGRAMS[program]).main
    told = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS=_WIDTH, NO_COLOR="1"), contextlib.redirect_stdout(told):
        try:
            code = main([*words, "--help"])
        except SystemExit as stop:
            code = stop.code or 0
    if code:
        raise ValueError(f"{program} {' '.join(words)} --help ended with {code}")
    return told.getvalue()


def subcommands(program: str) -> list[str]:
    """Names of the subcommands, in the order of the command's help."""
    module = import_module(PROGRAMS[program])
    return [name if isinstance(name, str) else name.__name__ for name in module.COMMANDS]


class CommandHelp(SphinxDirective):
    """`command-help` with the program's name; a section for each subcommand."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        program = self.arguments[0]
        shown: list[nodes.Node] = [_text(help_of(program))]
        for name in subcommands(program):
            title = f"{program} {name}"
            heading = nodes.title(title, "", nodes.literal(title, title))
            section = nodes.section("", heading, ids=[re.sub(r"\W", "-", title)])
            section += _text(help_of(program, name))
            self.state.document.note_implicit_target(section)
            shown.append(section)
        return shown


def _text(text: str) -> nodes.literal_block:
    return nodes.literal_block(text, text, language="text")


def setup(app: Sphinx) -> None:
    app.add_directive("command-help", CommandHelp)
