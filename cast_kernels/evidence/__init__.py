"""What can be shown of the GPU kernels without a GPU: compiled for each architecture, executed in emulation.

Nothing here is needed to run the library; `cast-kernels compile` and `cast-kernels emulate` are its commands. Modules
here import `ptx_emulator`, which lies beside this package where it is installed, and in `tools/` of a checkout.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("ptx_emulator") is None:
    sys.path.append(str(Path(__file__).parents[2] / "tools"))
