"""The GPU architectures that kernels are compiled for, and what of each decides how many of them fit.

NVIDIA's figures are from the CUDA programming guide's table of technical specifications per compute capability,
AMD's from the CDNA 3 instruction-set guide.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One architecture. Sizes are bytes of a multiprocessor (AMD: compute unit) unless they say otherwise."""

    name: str
    backend: str  # Triton's: "cuda" or "hip"
    arch: int | str  # Triton's: 80, or "gfx942"
    warp_size: int
    shared_limit: int  # that one CTA may ask for
    shared_total: int
    shared_reserved: int  # the system's own, per CTA
    max_warps: int
    max_ctas: int
    processors: int  # SMs or CUs of the usual card
    tensor_core: str  # regular expression of the opcode that a matrix product must become
    instruction: str  # what people call it

    @property
    def registers(self) -> int:
        """32-bit registers of a multiprocessor; AMD: 512 a lane on each of four SIMDs."""
        return 65536 if self.backend == "cuda" else 4 * 512 * 64


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166912, 167936, 1024, 64, 32, 108, r"HMMA\b", "mma.sync"),
        Target("sm_86", "cuda", 86, 32, 101376, 102400, 1024, 48, 16, 84, r"HMMA\b", "mma.sync"),
        Target("sm_89", "cuda", 89, 32, 101376, 102400, 1024, 48, 24, 128, r"HMMA\b", "mma.sync"),
        Target("sm_90", "cuda", 90, 32, 232448, 233472, 1024, 64, 32, 132, r"HGMMA\b", "wgmma"),
        Target("sm_100", "cuda", 100, 32, 232448, 233472, 1024, 64, 32, 148, r"UTC\w*MMA\b", "tcgen05"),
        Target("gfx942", "hip", "gfx942", 64, 65536, 65536, 0, 32, 32, 304, r"v_s?mfma\w*", "mfma"),
    )
}
#: Those whose PTX the emulator knows.
EMULATED = ("sm_80", "sm_90")


def target(name: str) -> Target:
    """The target of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in TARGETS:
        raise ValueError(f"target is {name!r}; allowed: {', '.join(TARGETS)}")
    return TARGETS[name]
