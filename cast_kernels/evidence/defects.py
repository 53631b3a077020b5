"""Whether a compiled kernel shows what ptxas is known to do wrongly, as far as code can show it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ptx_emulator.predict.resources import listing, opcodes, read_sass
from ptx_emulator.predict.wgmma_registers import touched_early

#: Of what ptxas touches too early, so many are named.
_NAMED = 3


def shown(ptx: str, cubin: bytes, architecture: int) -> Iterator[str]:
    """A failure for each kind of defect that one compiled kernel shows.

    A pattern in PTX is a failure whichever ptxas assembled it: which releases get it wrong is known in part only.

    Args:
        ptx: the kernel's.
        cubin: its machine code.
        architecture: 90 for sm_90.
    """
    return shown_by(ptx, listing(cubin), architecture)


def shown_by(ptx: str, code: str, architecture: int) -> Iterator[str]:
    """The same from nvdisasm's listing of the kernel."""
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
