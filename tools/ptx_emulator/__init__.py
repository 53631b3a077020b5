"""An emulator of NVIDIA PTX: executes compiled GPU code on a CPU, checks it and counts what it does::

    module = ptx_emulator.parse(ptx_text)
    memory = ptx_emulator.Memory()
    x = memory.register(array.view(np.uint8).reshape(-1), name="x")
    report = ptx_emulator.launch(module.kernels["f"], grid=(4, 1, 1), threads=128, arguments=[x, 7], memory=memory)
    memory.write_back()

Written from NVIDIA's PTX ISA document. It has no model of time; see `Counters` for what it counts.
"""

from ptx_emulator import native  # noqa: F401  (registers its engine)
from ptx_emulator.core.counters import Counters
from ptx_emulator.core.errors import (
    Deadlock,
    Divergence,
    EmulationError,
    MemoryFault,
    Misaligned,
    ParseError,
    SharedLimit,
    Trap,
    Unsupported,
)
from ptx_emulator.core.findings import Fault
from ptx_emulator.core.kernel import Kernel, Module
from ptx_emulator.core.launch import SHARED_LIMIT, Report, default_engine, launch
from ptx_emulator.core.memory import Memory
from ptx_emulator.core.parser import parse
from ptx_emulator.core.syntax import Instruction
from ptx_emulator.core.tensor_maps import TensorMap

__all__ = [
    "SHARED_LIMIT",
    "Counters",
    "Deadlock",
    "Divergence",
    "EmulationError",
    "Fault",
    "Instruction",
    "Kernel",
    "Memory",
    "MemoryFault",
    "Misaligned",
    "Module",
    "ParseError",
    "Report",
    "SharedLimit",
    "TensorMap",
    "Trap",
    "Unsupported",
    "default_engine",
    "launch",
    "parse",
]
