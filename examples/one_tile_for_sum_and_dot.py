"""A fault of Triton's compiler (triton-lang/triton#6691), found in seconds without a GPU.

    python examples/one_tile_for_sum_and_dot.py [--without-sum]

In a pipelined loop one tile is an operand of `tl.dot` and `tl.sum`. For sm_90, Triton 3.8 and 3.9 let the copy of a
later tile begin while `wgmma` may still read the same memory. docs/triton_6691.md explains the report.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from ptx_emulator.triton import Checker, checking
from torch import Tensor


@triton.jit
def product_and_sums(x, w, product, sums, k, SUM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column = tl.arange(0, M), tl.arange(0, N)
    total, added = tl.zeros((M, N), tl.float32), tl.zeros((M,), tl.float32)
    for start in range(0, k, K):
        inner = start + tl.arange(0, K)
        tile = tl.load(x + row[:, None] * k + inner[None, :])
        other = tl.load(w + inner[:, None] * N + column[None, :])
        if SUM:
            added += tl.sum(tile.to(tl.float32), 1)
        total = tl.dot(tile, other, total)
    tl.store(product + row[:, None] * N + column[None, :], total)
    tl.store(sums + row, added)


def check(target: str, summed: bool) -> tuple[Checker, Tensor]:
    """Launch the kernel once -> the checker, and the product's largest error."""
    x, w = torch.randn(64, 256).bfloat16(), torch.randn(256, 64).bfloat16()
    product, sums = torch.zeros(64, 64), torch.zeros(64)
    with checking(target) as checker:
        product_and_sums[(1,)](x, w, product, sums, 256, SUM=summed, M=64, N=64, K=32)
    return checker, (product - x.float() @ w.float()).abs().max()


def main(words: Sequence[str] | None = None) -> int:
    """Print the report; 1 if there are findings."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--without-sum", action="store_true", help="the same loop with the product alone")
    parser.add_argument("--target", choices=("sm_80", "sm_90"), default="sm_90", help="architecture (sm_90)")
    options = parser.parse_args(words)
    checker, error = check(options.target, not options.without_sum)
    print(f"Triton {triton.__version__}; the product's largest error: {error:.1e}")
    print(checker.text())
    return 1 if checker.findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
