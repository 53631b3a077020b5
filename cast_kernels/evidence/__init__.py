"""Evidence about the GPU kernels without a GPU: compiled for each architecture, executed in emulation.

The library runs without this package; `cast-kernels compile` and `cast-kernels emulate` are its commands. Its modules
import `ptx_emulator`, which an installation has beside this package, and a checkout in `tools/`.
"""

import importlib.util
import sys
from pathlib import Path


def find_emulator() -> None:
    """Make `import ptx_emulator` work.

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


find_emulator()
