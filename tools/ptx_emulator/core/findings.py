"""What the checks find, and which of it is a note."""

from dataclasses import dataclass

#: Kinds that are notes and no faults: several warps write one word, and who is last changes nothing, or the last bits.
SAME, NEAR = "write-write of the same value", "write-write of values that differ by rounding"
UNWRITTEN = "read of a word that nobody wrote"  #: a note too, since the value may go unused
NOTES = (SAME, NEAR, UNWRITTEN)


def shortened(text: str, length: int = 100) -> str:
    """An instruction's text for a message: a wgmma names up to 128 registers."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


@dataclass(frozen=True)
class Fault:
    """A finding of the checks: two accesses of which the order is not settled, or data in flight that was read."""

    kind: str  #: "write-read", "write-write", "read-write", or one about data in flight
    instruction: str  #: that came later in the emulation
    other: str  #: that came before it
    word: int  #: number of the 4-byte word in the CTA's shared memory; below 0: none
    warps: tuple[int, int]  #: (the other's, the instruction's)
    epoch: int  #: barriers that the CTA had completed before
    cta: int  #: number in the grid
    line: str = ""  #: of the kernel's source, "file:line", where PTX names it
    other_line: str = ""  #: the same of the other
    agents: tuple[str, str] = ("", "")  #: in place of the warps: who of a cluster, or the async proxy

    @property
    def differs(self) -> bool:
        """Whether it is a note of which values differ: float32 numbers by rounding, or integers that look like such."""
        return self.kind == NEAR

    def __str__(self) -> str:
        if self.word < 0:  # it is about instructions, not about who executed them
            after = f" after `{shortened(self.other)}`{_at(self.other_line)}" if self.other != self.instruction else ""
            return f"{self.kind}, CTA {self.cta}: `{shortened(self.instruction)}`{_at(self.line)}{after}"
        other, mine = (agent or f"warp {warp}" for agent, warp in zip(self.agents, self.warps, strict=True))
        return (
            f"{self.kind} at shared word {self.word} of CTA {self.cta}, epoch {self.epoch}: {mine} in "
            f"`{shortened(self.instruction)}`{_at(self.line)} after {other} in "
            f"`{shortened(self.other)}`{_at(self.other_line)}"
        )


def _at(line: str) -> str:
    return f" ({line})" if line else ""
