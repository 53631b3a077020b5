"""An engine that runs kernels by compiled code, equal to the interpreter in values, counters and findings.

`csrc/ptx` has the code: a machine whose instructions work on all threads of a CTA. It is loaded when it is first used.
"""

from ptx_emulator.core.launch import ENGINES
from ptx_emulator.native.machine import NativeMachine

ENGINES["native"] = NativeMachine
