"""A kernel of ten lines that reads outside of its tensor: the fault is found without a GPU.

    python examples/check_a_triton_kernel.py [--fixed] [--target sm_80]

The kernel adds two vectors; the mask of one load is missing. On a GPU this would usually pass, because there is memory
after a tensor. The emulator maps only the bytes that each tensor views.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from ptx_emulator.triton import checking


@triton.jit
def add(x, y, out, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(x + at, mask=at < n)
    right = tl.load(y + at, mask=at < n) if MASKED else tl.load(y + at)  # without the mask
    tl.store(out + at, left + right, mask=at < n)


def main(words: Sequence[str] | None = None) -> int:
    """Launch the kernel once and print the findings; 1 if there are any."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--fixed", action="store_true", help="with the mask")
    parser.add_argument("--target", choices=("sm_80", "sm_90"), default="sm_90", help="architecture (sm_90)")
    options = parser.parse_args(words)
    x, y, out = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    with checking(options.target) as checker:
        add[(triton.cdiv(1000, 256),)](x, y, out, 1000, MASKED=options.fixed, BLOCK=256)
    print(checker.text())
    return 1 if checker.findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
