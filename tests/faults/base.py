"""What a deliberate fault is, and what may notice it."""

from __future__ import annotations

from dataclasses import dataclass

#: What notices a fault: the native test program in one of its builds. Anything else is pytest's arguments.
NATIVE, MEMORY, RACE = "native", "memory", "race"
BUILDS = {
    NATIVE: ["-DCAST_OPTIMISE=-O1"],
    MEMORY: ["-DCAST_KERNELS_SANITIZE=address,undefined"],
    RACE: ["-DCAST_KERNELS_SANITIZE=thread"],
}


@dataclass(frozen=True)
class Fault:
    """One deliberate fault: (file, text, its replacement) triples, and what must notice it."""

    name: str
    noticed_by: str
    edits: tuple[tuple[str, str, str], ...]


def fault(name: str, noticed_by: str, *edits: tuple[str, str, str]) -> Fault:
    return Fault(name, noticed_by, edits)
