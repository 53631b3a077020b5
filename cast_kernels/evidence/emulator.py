"""Where the emulator is: `ptx_emulator` lies beside this package, installed or in `tools/` of the checkout."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any


def load_emulator() -> Any:
    """The module `ptx_emulator`: as it is installed, or from `tools/` of the checkout that this package is in.

    Raises:
        ModuleNotFoundError: it is in neither place.
    """
    tools = Path(__file__).parents[2] / "tools"
    if importlib.util.find_spec("ptx_emulator") is None:
        if not (tools / "ptx_emulator").is_dir():
            raise ModuleNotFoundError(
                f"no module ptx_emulator, neither installed nor in {tools}: the package brings it beside cast_kernels, "
                "so this installation is not whole; install it again, by pip install . in a checkout"
            )
        sys.path.append(str(tools))
    return importlib.import_module("ptx_emulator")
