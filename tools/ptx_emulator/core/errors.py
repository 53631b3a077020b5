"""What an emulation can end with. Every error names the instruction it happened at."""

from typing import Any


class EmulationError(Exception):
    """A kernel did what a GPU would refuse, or what this emulator cannot do."""

    args: tuple[Any, ...]

    def located(self, line: str) -> "EmulationError":
        """The same error with the kernel's source line, where PTX names one."""
        if line:
            self.args = (f"{self.args[0]} ({line})", *self.args[1:])
        return self


class ParseError(EmulationError):
    """The text is not PTX as this emulator reads it."""


class Unsupported(EmulationError):
    """An instruction, modifier or directive outside the emulated set; never skipped silently."""


class MemoryFault(EmulationError):
    """An access outside every registered buffer, outside the CTA's shared memory or outside a thread's local memory."""


class Misaligned(EmulationError):
    """An address that is no multiple of the access width."""


class SharedLimit(EmulationError):
    """Static plus dynamic shared memory above what the target lets a CTA have."""


class Deadlock(EmulationError):
    """Every live thread waits at a barrier that cannot complete."""


class Trap(EmulationError):
    """The kernel executed `trap`."""


class Divergence(EmulationError):
    """An instruction that all threads of a warp or warpgroup must execute together, reached by some of them only."""
