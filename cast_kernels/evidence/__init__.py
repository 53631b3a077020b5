"""What can be shown of the GPU kernels without a GPU: compiled for each architecture, executed in emulation.

Nothing here is needed to run the library; `cast-kernels compile` and `cast-kernels emulate` are its commands. The
modules import `ptx_emulator`, so this package finds it first, or says that it is missing.
"""

from cast_kernels.evidence.emulator import load_emulator

load_emulator()
