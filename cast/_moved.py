"""Modules under the names that they once had: an old name imports the module from its new place, and warns."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Old name -> new name.
MOVED = {
    "cast.evaluation.checkpoint": "cast.loading.checkpoint",
    "cast.evaluation.ensemble": "cast.loading.ensemble",
    "cast.evaluation.protocol": "cast.video.views",
    "cast.training.simple": "cast.training.indexed",
}


class Moved:
    """Python asks this finder last, so it costs nothing where the module is found in its place."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A specification for an old name, nothing for another one."""
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]  # a loader by its methods

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own module, which :meth:`exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in the place of the old one, so that there is one of each class."""
        old = module.__name__
        warnings.warn(f"the module {old} is now {MOVED[old]}", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(MOVED[old])


def keep_old_names() -> None:
    """Let Python find modules by their old names, from now on."""
    sys.meta_path.append(Moved())
