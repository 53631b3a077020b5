"""Modules under the names that they once had: an old name imports the module from its new place, and warns."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

#: What is now in the room of the model, and what is now in the ground.
_MODEL = ("block", "config", "experts", "heads", "hub", "labels", "layers", "positions", "weights", "zoo")
_GROUND = ("files", "graphs", "optional", "processes", "sampling", "transfer")

#: Old name -> new name.
MOVED = {
    **{f"cast.{name}": f"cast.model.{name}" for name in _MODEL},
    **{f"cast.{name}": f"cast.ground.{name}" for name in _GROUND},
    "cast.evaluation.checkpoint": "cast.loading.checkpoint",
    "cast.evaluation.ensemble": "cast.loading.ensemble",
    "cast.evaluation.protocol": "cast.video.views",
    "cast.published": "cast.metrics.published",
    "cast.training.simple": "cast.training.indexed",
}


class Moved:
    """Python asks this finder for what is not found in its place, so that other imports take no longer."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """A specification for an old name, nothing for another one."""
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]  # a loader by its methods

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own module, which :meth:`exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in the place of the old one, so that there is one of each class."""
        from pkgutil import iter_modules  # only here: `import cast` is to stay quick

        old = module.__name__
        warnings.warn(f"the module {old} is now {MOVED[old]}", DeprecationWarning, stacklevel=2)
        new = import_module(MOVED[old])
        sys.modules[old] = new
        for inner in iter_modules(getattr(new, "__path__", ())):  # a package's: Python would load them a second time
            sys.modules[f"{old}.{inner.name}"] = import_module(f"{MOVED[old]}.{inner.name}")


def keep_old_names() -> None:
    """Let Python find modules by their old names, from now on."""
    finders: list[object] = [*sys.meta_path]
    sys.meta_path.insert(finders.index(PathFinder) + 1 if PathFinder in finders else len(finders), Moved())
