"""Whether an installed wheel works, run by the Python that has it, away from the source tree: `installed_process.py`.

cibuildwheel runs it for every wheel, tests/test_build.py for the one built here. The last line printed is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import cast
import cast_kernels
from cast_kernels import info, reference


def largest_error() -> float:
    """Of backend cpu's outputs and gradients in float32 against the reference in float64, next to the largest value."""
    torch.manual_seed(0)
    module = cast_kernels.BCAST(32, 16, 2, 2, 5, backend="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    streams = [torch.randn(2, 2, 6, 32), torch.randn(2, 2, 5, 32)]
    results = []
    for dtype in (torch.float32, torch.float64):
        own = module.to(dtype)
        own.zero_grad()
        given = [x.to(dtype, copy=True).requires_grad_() for x in streams]
        exact = dtype == torch.float64
        outputs = reference.bcast(*given, own.gathered(), num_heads=2) if exact else own(*given)
        sum((x * x).sum() for x in outputs).backward()
        tensors = [*outputs, *(x.grad for x in given), *(p.grad for p in own.parameters())]
        results.append([x.detach().double() for x in tensors])
    return max(((ours - exact).abs().max() / exact.abs().max()).item() for ours, exact in zip(*results, strict=True))


def openmp_runtimes() -> list[str]:
    """The files of OpenMP runtimes that this process has loaded: two would be two pools of threads."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if "libgomp" in line or "libomp" in line})


def main() -> int:
    """Print what was found, and return 1 if the core is missing, wrong, or brought an OpenMP runtime of its own."""
    cpu = info.collect()["cpu"]
    error = largest_error() if cpu["built"] else float("nan")
    runtimes = openmp_runtimes()
    print(
        json.dumps(
            {
                "package": cast_kernels.__file__, "model": cast.__file__, "version": cast_kernels.__version__,
                "built": cpu["built"], "levels": cpu.get("levels", []), "error": error, "openmp": runtimes,
            }
        )
    )  # fmt: skip
    return 0 if cpu["built"] and error < 1e-4 and len(runtimes) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
