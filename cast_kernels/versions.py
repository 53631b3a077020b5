"""The oldest torch and Triton that the package runs with. docs/versions.md lists the tested releases.

Importing this module refuses an older torch, which would otherwise fail later with a confusing message.
"""

from __future__ import annotations

import re

import torch

#: The oldest release of each package that the tests ran with. pyproject.toml requires the same torch.
OLDEST = {"torch": (2, 10), "triton": (3, 6)}

#: The first Triton with a fence between asynchronous copies and wgmma or tcgen05, which PTX's memory model requires.
#: With older ones the emulator reports every such kernel of sm_90. GPUs have run such code for years; this does not
#: prove it right.
FENCED_TRITON = (3, 7, 1)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers: "2.11.0+cu130" -> (2, 11, 0), "2.10.0a0+git1234" -> (2, 10, 0), "git" -> ()."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def too_old(package: str, version: str) -> str:
    """Why the package's version is refused and which would do; "" if it is new enough or names no release.

    Args:
        package: a key of :data:`OLDEST`.
        version: as the package gives it.
    """
    if not release(version) or release(version) >= OLDEST[package]:
        return ""
    needed = ".".join(map(str, OLDEST[package]))
    return f"{package} {version} is too old: cast_kernels needs {needed} or newer; pip install '{package}>={needed}'"


if too_old("torch", torch.__version__):
    raise ImportError(too_old("torch", torch.__version__))
