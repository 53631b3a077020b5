"""Triton's and Gluon's launches without a GPU: compiled for a target, executed by the emulator, checked::

    from ptx_emulator.triton import checking

    with checking("sm_90") as checker:
        kernel[grid](x, y, n, BLOCK=128)  # on CPU tensors
    print(checker.text())

It needs torch and Triton, which the rest of the emulator does not. The commands are `python -m ptx_emulator run` and
`pytest --ptx-target`.
"""

from ptx_emulator.triton.checker import Checker, Finding, checking
from ptx_emulator.triton.driver import Argument, Launch, Launcher, Record, Recorder, offline_driver
from ptx_emulator.triton.launcher import EmulationFault, Emulator

__all__ = [
    "Argument",
    "Checker",
    "EmulationFault",
    "Emulator",
    "Finding",
    "Launch",
    "Launcher",
    "Record",
    "Recorder",
    "checking",
    "offline_driver",
]
