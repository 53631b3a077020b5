"""Known defects of ptxas in a compiled kernel, if the code shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ptx_emulator.predict.resources import listing, opcodes, read_sass
from ptx_emulator.predict.wgmma_registers import touched_early

#: Most registers in a message that ptxas uses too early.
_NAMED = 3


def shown(ptx: str, cubin: bytes, architecture: int) -> Iterator[str]:
    """A failure for each kind of defect in one compiled kernel.

    A pattern in PTX is a failure for every ptxas, because the defective releases are known only in part.

    Args:
        ptx: of the kernel.
        cubin: its machine code.
        architecture: 90 for sm_90.
    """
    return shown_by(ptx, listing(cubin), architecture)


def shown_by(ptx: str, code: str, architecture: int) -> Iterator[str]:
    """The same, from nvdisasm's listing of the kernel."""
    if architecture == 90:
        touched = touched_early(code)
        yield from map(str, touched[:_NAMED])
        if len(touched) > _NAMED:
            yield f"{len(touched) - _NAMED} more registers of wgmmas are touched too early"
        if re.search(r"\badd(\.sat)?\.[su]16x2\b", ptx):
            yield "a packed addition of 16 bits, of which ptxas 12.9.86 loses constants"
    negated = re.search(r"\bneg\.s32\b", ptx) and re.search(r"\bmax\.s32\b", ptx)
    if 100 <= architecture < 110 and negated and opcodes(read_sass(code)[0])["VIMNMX3"]:
        yield "VIMNMX3 beside neg and max, with which ptxas until 13.3 loses the negated operand"
