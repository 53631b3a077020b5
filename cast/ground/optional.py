"""Packages that only some jobs need."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """An optional package is not installed; the message has the command that installs it."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which the extra `extra` of this package installs.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise  # the package is installed, but a module that it imports is missing
        message = f"the package {package!r} is not installed; run: pip install 'cast-kernels[{extra}]'"
        raise MissingExtraError(message, name=package) from None
