"""Old names of modules: an old name imports the module from its new place, and warns."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

#: Modules that moved to `cast.model`, and modules that moved to `cast.ground`.
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
    """A finder for names that Python does not find elsewhere, so that other imports are not slower."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """A specification for an old name, None for another one."""
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]  # it has a loader's methods

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own module, which :meth:`exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Replace the old module by the new one, so that each class exists once."""
        from pkgutil import iter_modules  # imported here to keep `import cast` quick

        old = module.__name__
        warnings.warn(f"the module {old} is now {MOVED[old]}", DeprecationWarning, stacklevel=2)
        new = import_module(MOVED[old])
        sys.modules[old] = new
        # Otherwise Python would load a package's modules a second time.
        for inner in iter_modules(getattr(new, "__path__", ())):
            sys.modules[f"{old}.{inner.name}"] = import_module(f"{MOVED[old]}.{inner.name}")


def keep_old_names() -> None:
    """Let Python find modules by their old names from now on."""
    finders: list[object] = [*sys.meta_path]
    sys.meta_path.insert(finders.index(PathFinder) + 1 if PathFinder in finders else len(finders), Moved())
