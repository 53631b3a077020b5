"""The GPU's measured ceilings. Reports give shares of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cast_kernels.gpu.machine import Machine, require_usable
from cast_kernels.gpu.timing import median_ms


def ceilings(
    machine: Machine, samples: int, copy_bytes: int = 1 << 30, gemm: int = 8192
) -> Iterator[tuple[str, float]]:
    """Copy bandwidth in B/s (read and written bytes) and the rates of a square GEMM in FLOP/s, one after the other.

    Args:
        machine: to measure.
        samples: their median counts.
        copy_bytes: read, and as many written.
        gemm: rows and columns of the matrices, bf16 and fp32 (in fp32 without tf32, as PyTorch's default).
    """
    require_usable(machine)
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    yield "copy_bytes_per_s", 2e3 * copy_bytes / median_ms(machine, lambda: target.copy_(source), samples)
    for name, dtype in (("gemm_flops_per_s", torch.bfloat16), ("gemm_fp32_flops_per_s", torch.float32)):
        a = torch.randn(gemm, gemm, device=machine.device).to(dtype)
        yield name, 2e3 * gemm**3 / median_ms(machine, lambda a=a: a @ a, samples)  # type: ignore[misc]
